"""ProgressiveSpinalNet: every layer sees the whole input and all earlier layers.

Paper: "ProgressiveSpinalNet architecture for FC layers", Chopra, https://arxiv.org/abs/2103.11373
"""

from functools import partial
from typing import List

import torch
from torch import nn

from .classifier_head import ClassifierHead, check_positive, hidden_block


class ProgressiveLayers(nn.Module):
    """Hidden layers of ProgressiveSpinalNet: (N, F) -> (N, F + L * W).

    With the input x and one dropout mask per forward (docs/papers/progressive_spinalnet.md, section 2)::

        z_0 = Dropout_p(x)
        h_1 = block(x)            F             -> W   (x without dropout)
        h_i = block(z_{i-1})      F + (i - 1) W -> W   i = 2 .. L
        z_i = [z_{i-1}, h_i]
        out = z_L

    Args:
        in_features: Input width F.
        layers: Number of hidden layers L.
        width: Layer width W.
        skip_dropout: Dropout rate p on the input that layers 2 .. L and the output see.
        dropout: Dropout rate in front of each linear, in a head of the last one too.
        norm_layer: timm name of a norm behind each linear, '' for none.
        act_layer: timm name of the activation.

    Raises:
        ValueError: If a size is not positive or a rate lies outside [0, 1).
    """

    def __init__(
            self,
            in_features: int,
            layers: int = 4,
            width: int = 200,
            skip_dropout: float = 0.2,
            dropout: float = 0.,
            norm_layer: str = '',
            act_layer: str = 'relu',
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_positive(in_features=in_features, layers=layers, width=width)
        if not 0. <= skip_dropout < 1.:
            raise ValueError(f'skip_dropout must lie in [0, 1), got {skip_dropout}.')
        self.in_features = in_features
        self.out_features = in_features + layers * width
        self.dropout = dropout
        self.skip_drop = nn.Dropout(skip_dropout)
        create_block = partial(
            hidden_block,
            width=width,
            dropout=dropout,
            norm_layer=norm_layer,
            act_layer=act_layer,
            device=device,
            dtype=dtype,
        )
        self.first = create_block(in_features)
        self.blocks = nn.ModuleList()
        for i in range(1, layers):
            self.blocks.append(create_block(in_features + i * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: List[torch.Tensor] = [self.skip_drop(x), self.first(x)]
        for block in self.blocks:
            # of all parts, not of the last result and h: in the backward pass only gradients of the parts are added
            z.append(block(torch.cat(z, dim=1)))
        return torch.cat(z, dim=1)


class ProgressiveSpinalHead(ClassifierHead):
    """ProgressiveSpinalNet classifier: (N, F) -> (N, C); pre-logits z_L of width F + L * W.

    Parameters without norm: L W (F + 1) + W^2 L (L - 1) / 2 + (F + L W) C + C (docs/papers/progressive_spinalnet.md,
    section 4).

    Args:
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C.
        **options: Those of :class:`ProgressiveLayers`, which documents the errors too.
    """

    hidden_layers = ProgressiveLayers
    paper = '2103.11373'
