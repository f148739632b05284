"""The small MNIST CNN, with the plain classifier, the spinal classifier, and three spinal chains.

Paper: "SpinalNet: Deep Neural Network with Gradual Input", https://arxiv.org/abs/2007.03347 (docs/papers/spinalnet.md,
section 3.2).

The scripts flatten the last map, 20x4x4 at 28x28 and at no other size; here it is pooled to 4x4 first, which is the
identity at 28x28. They end in log_softmax, these models in logits: cross entropy on either is equal.
"""

from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import register_model
from torch import nn

from ..layers import ClassifierHead, SpinalLayers
from ..layers.classifier_head import hidden_block
from ._packaged import generate_default_cfgs
from ._small_heads import PlainHead
from ._small_net import SPINAL_PAPER, SmallNet, build_small_net, small_net_cfg, strip_head_prefix

__all__ = ['SpinalCnn', 'SpinalCnnTaps']

GRID = 4  # positions per side of the last map at 28x28
CONV1_CHS, CONV2_CHS = 10, 20
CELLS = (7, 3, 1)  # pixels, conv1 and conv2 maps at 28x28 are 28, 12 and 4 wide: so many positions per grid cell
CHAIN_LAYERS = (10, 8, 8)


class SpinalCnn(SmallNet):
    """Conv 5x5, pool, conv 5x5, dropout, pool, then any head on 20x4x4; 5,280 parameters before it.

    Args:
        head: 'plain' (Linear 50, ReLU, dropout), 'linear', 'mlp', 'spinal' or 'pspinal'.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: timm's pooling type, here from the last map to a 4x4 grid.
        drop_rate: Dropout rate on the pooled vector.
        num_features: Channels of the feature map, where it is not the last convolution's.
        **head_options: Options of the head, ``head_width`` and so on.
    """

    def __init__(
            self,
            head: str = 'spinal',
            num_classes: int = 10,
            in_chans: int = 1,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            num_features: Optional[int] = None,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        stages = [
            nn.Sequential(nn.Conv2d(in_chans, CONV1_CHS, 5, **dd)),
            nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
            nn.Sequential(nn.Conv2d(CONV1_CHS, CONV2_CHS, 5, **dd), nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.ReLU()),
        ]
        super().__init__(
            stages,
            channels=(CONV1_CHS, CONV1_CHS, CONV2_CHS),
            reductions=(1, 2, 4),
            head=head,
            head_options=strip_head_prefix(head_options),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            num_features=num_features,
            grid=GRID,
            **dd,
        )


class TapChains(nn.Module):
    """Three independent spinal chains and a hidden layer behind them: (N, F) -> (N, 50).

    Each tap runs through its own :class:`SpinalLayers` of width W, 10 layers over the pixels, 8 over conv1 and 8 over
    conv2, two splits each. The 26 outputs [pixels h_0..h_9, conv1 h_0..h_7, conv2 h_0..h_7] go through Linear and ReLU.

    Args:
        in_features: F = 16 (49 in_chans + 90 + 20), the taps as :class:`SpinalCnnTaps` packs them on a 4x4 grid.
        width: Layer width W.
        act_layer: timm name of the activation.
    """

    def __init__(self, in_features: int, width: int = 30, act_layer: str = 'relu', device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        conv_chs = [CONV1_CHS * CELLS[1] ** 2, CONV2_CHS * CELLS[2] ** 2]
        pixel_chs = in_features // GRID ** 2 - sum(conv_chs)
        assert pixel_chs > 0 and pixel_chs % CELLS[0] ** 2 == 0, 'Concat pooling is not supported by the three chains.'
        self.tap_chs: List[int] = [pixel_chs, *conv_chs]
        self.cells: List[int] = list(CELLS)
        self.grid = GRID
        self.chains = nn.ModuleList([
            SpinalLayers(chs * GRID ** 2, layers, 2, width, dropout=0., norm_layer='', act_layer=act_layer, **dd)
            for chs, layers in zip(self.tap_chs, CHAIN_LAYERS)
        ])
        self.out_features = 50
        self.out = hidden_block(sum(CHAIN_LAYERS) * width, self.out_features, act_layer=act_layer, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = x.reshape(-1, sum(self.tap_chs), self.grid, self.grid)
        h: List[torch.Tensor] = []
        start = 0
        for i, chain in enumerate(self.chains):
            tap = packed.narrow(1, start, self.tap_chs[i])
            h.append(chain(F.pixel_shuffle(tap, self.cells[i]).flatten(1)))
            start += self.tap_chs[i]
        return self.out(torch.cat(h, dim=1))


class TapHead(ClassifierHead):
    """:class:`TapChains`, then the last linear: (N, F) -> (N, C)."""

    hidden_layers = TapChains


class PackTaps(nn.Module):
    """Pixels, conv1 map and conv2 map as one map: (N, 49 in_chans + 90 + 20, 4, 4).

    Each tap is pooled to 28, 12 or 4 positions per side (the identity at 28x28), and the positions within a cell of the
    4x4 grid become channels. Nothing is lost: :class:`TapChains` undoes it.
    """

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList([SelectAdaptivePool2d(GRID * cell, 'avg') for cell in CELLS])
        self.cells: List[int] = list(CELLS)

    def forward(self, taps: List[torch.Tensor]) -> torch.Tensor:
        packed: List[torch.Tensor] = []
        for i, pool in enumerate(self.pools):
            packed.append(F.pixel_unshuffle(pool(taps[i]), self.cells[i]))
        return torch.cat(packed, dim=1)


class SpinalCnnTaps(SpinalCnn):
    """The MNIST CNN with spinal chains over pixels, conv1 and conv2 ("Arch2").

    ``forward_features`` gives all three taps packed on the 4x4 grid, so that the head has them from one map; the levels
    of ``features_only`` are those of :class:`SpinalCnn`. Concat pooling is refused.

    Args:
        head: 'taps', or a head of :class:`SpinalCnn` over the packed taps.
    """

    heads = {'taps': TapHead, 'plain': PlainHead}

    def __init__(self, head: str = 'taps', in_chans: int = 1, **kwargs: Any):
        packed_chs = in_chans * CELLS[0] ** 2 + CONV1_CHS * CELLS[1] ** 2 + CONV2_CHS * CELLS[2] ** 2
        super().__init__(head, in_chans=in_chans, num_features=packed_chs, **kwargs)
        self.pack: Optional[PackTaps] = PackTaps()

    def join(self, x: torch.Tensor, outputs: List[torch.Tensor]) -> torch.Tensor:
        if self.pack is None:
            return outputs[-1]
        return self.pack([x, outputs[1], outputs[2]])

    def _drop_join(self) -> None:
        self.pack = None


def _create_spinal_cnn(net_cls, variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    return build_small_net(net_cls, variant, pretrained, num_stages=3, **kwargs)


def _cfg(**kwargs: Any):
    return small_net_cfg(pool_size=(GRID, GRID), **dict(SPINAL_PAPER, min_input_size=(1, 16, 16), **kwargs))


# What reads the pixels directly is created again when a checkpoint is loaded with another number of input channels.
_PIXEL_CHAIN = tuple(
    f'head.hidden.chains.0.{block}.fc' for block in ['first', *(f'blocks.{i}' for i in range(CHAIN_LAYERS[0] - 1))])

default_cfgs = generate_default_cfgs({
    'spinalcnn_plain': _cfg(),
    'spinalcnn_a1': _cfg(),
    'spinalcnn_a2': _cfg(first_conv=('stages.0.0', *_PIXEL_CHAIN)),
})


@register_model
def spinalcnn_plain(pretrained: bool = False, **kwargs: Any) -> SpinalCnn:
    """The baseline of ``spinalcnn_a1`` and ``spinalcnn_a2``: Linear 50, ReLU, dropout 0.5; 21,840 parameters."""
    model_args = dict(head='plain', head_widths=(50,), head_dropout=0.5)
    return _create_spinal_cnn(SpinalCnn, 'spinalcnn_plain', pretrained, **dict(model_args, **kwargs))


@register_model
def spinalcnn_a1(pretrained: bool = False, **kwargs: Any) -> SpinalCnn:
    """MNIST CNN with a spinal head of 6 layers, W = 8; 13,818 parameters (``head_width=10``: 16,050)."""
    model_args = dict(head='spinal', head_layers=6, head_width=8, head_dropout=0., head_norm_layer='')
    return _create_spinal_cnn(SpinalCnn, 'spinalcnn_a1', pretrained, **dict(model_args, **kwargs))


@register_model
def spinalcnn_a2(pretrained: bool = False, **kwargs: Any) -> SpinalCnnTaps:
    """MNIST CNN with three spinal chains, W = 30; 395,120 parameters.

    The paper's widths are 30 (MNIST), 50 (KMNIST, QMNIST, EMNIST digits; 677,640) and 300 (Fashion-MNIST; 5,761,640),
    set by ``head_width``.
    """
    model_args = dict(head='taps', head_width=30)
    return _create_spinal_cnn(SpinalCnnTaps, 'spinalcnn_a2', pretrained, **dict(model_args, **kwargs))
