"""SpinalNet: hidden layers that take the input bit by bit.

Paper: "SpinalNet: Deep Neural Network with Gradual Input", Kabir et al., https://arxiv.org/abs/2007.03347
"""

import math
from functools import partial
from typing import List

import torch
from torch import nn

from .classifier_head import ClassifierHead, check_positive, hidden_block


class SpinalLayers(nn.Module):
    """Hidden layers of SpinalNet: (N, F) -> (N, L * W).

    With K input splits s_0 .. s_{K-1} of size S (docs/papers/spinalnet.md, section 2)::

        h_0 = block(s_0)                    S     -> W
        h_i = block([s_{i mod K}, h_{i-1}]) S + W -> W
        out = [h_0, h_1, ..., h_{L-1}]

    S = ceil(F / K), and a last split that would run past F is moved back to end there, so no feature is lost where K
    does not divide F. Where K divides F this is the papers' rule. The originals drop a feature or fail at odd widths
    (docs/papers/spinalnet.md, section 6, D7 and D8).

    Args:
        in_features: Input width F.
        layers: Number of hidden layers L, at least ``splits``, so that every feature is read.
        splits: Number of input splits K.
        width: Layer width W.
        dropout: Dropout rate in front of each linear, in a head of the last one too.
        norm_layer: timm name of a norm behind each linear, '' for none.
        act_layer: timm name of the activation.
        shared: Use one block for all layers but the first (docs/papers/spinalnet.md, section 3.5).

    Raises:
        ValueError: If a size is not positive, splits > in_features, or layers < splits.
    """

    def __init__(
            self,
            in_features: int,
            layers: int = 4,
            splits: int = 2,
            width: int = 512,
            dropout: float = 0.5,
            norm_layer: str = 'batchnorm1d',
            act_layer: str = 'relu',
            shared: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_positive(in_features=in_features, layers=layers, splits=splits, width=width)
        if splits > in_features:
            raise ValueError(f'splits ({splits}) must not exceed the {in_features} input features.')
        if layers < splits:
            raise ValueError(f'layers ({layers}) must be at least splits ({splits}), or input features are never read.')
        self.in_features = in_features
        self.out_features = layers * width
        self.dropout = dropout
        self.split_size = math.ceil(in_features / splits)
        self.split_starts = [
            min((i % splits) * self.split_size, in_features - self.split_size) for i in range(layers)]
        create_block = partial(
            hidden_block,
            width=width,
            dropout=dropout,
            norm_layer=norm_layer,
            act_layer=act_layer,
            device=device,
            dtype=dtype,
        )
        self.first = create_block(self.split_size)
        num_blocks = min(1, layers - 1) if shared else layers - 1
        self.repeats = layers - 1 if shared else 1  # applications of each block
        self.blocks = nn.ModuleList([create_block(self.split_size + width) for _ in range(num_blocks)])

    def split(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Input split of layer i, (N, S)."""
        return x.narrow(1, self.split_starts[i], self.split_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: List[torch.Tensor] = [self.first(self.split(x, 0))]
        for block in self.blocks:
            for _ in range(self.repeats):
                h.append(block(torch.cat([self.split(x, len(h)), h[-1]], dim=1)))
        return torch.cat(h, dim=1)


class SpinalHead(ClassifierHead):
    """SpinalNet classifier: (N, F) -> (N, C); pre-logits [h_0, ..., h_{L-1}] of width L * W.

    Parameters without norm: L W (S + 1) + (L - 1) W^2 + L W C + C (docs/papers/spinalnet.md, section 4).

    Args:
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C.
        **options: Those of :class:`SpinalLayers`, which documents the errors too.
    """

    hidden_layers = SpinalLayers
    paper = '2007.03347'
