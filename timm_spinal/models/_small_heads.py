"""Pooling to a fixed grid, and the classifiers of the papers' baselines."""

from typing import Sequence

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from ..layers import ClassifierHead
from ..layers.classifier_head import check_positive, hidden_block


class GridPool(nn.Module):
    """Pool a map (N, C, H, W) to a fixed grid and flatten it to (N, grid * grid * C).

    The papers' scripts flatten the map of one image size. Pooling to the grid of that size first is the identity there,
    and lets a net take images of other sizes.

    Args:
        pool_type: timm's pooling type; '' passes the map through.
        grid: Positions per side.
        position_major: Flatten position by position, rows first, instead of channel by channel.
    """

    def __init__(self, pool_type: str = 'avg', grid: int = 1, position_major: bool = False):
        super().__init__()
        self.pool = SelectAdaptivePool2d(grid, pool_type)
        self.pool_type: str = self.pool.pool_type
        self.position_major = position_major
        self.features_per_channel: int = grid * grid * self.pool.feat_mult()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(x)
        if not self.pool_type:
            return x
        if self.position_major:
            x = x.permute(0, 2, 3, 1)
        return x.flatten(1)


class PlainLayers(nn.Sequential):
    """Hidden layers of given widths: (N, F) -> (N, widths[-1]).

    Args:
        in_features: Input width F.
        widths: Width of each layer.
        in_dropout: Dropout rate in front of the first layer.
        hidden_dropout: Dropout rate in front of the other layers.
        dropout: Dropout rate in front of the linear behind the layers.
        act_layer: timm name of the activation.

    Raises:
        ValueError: If there is no width, or one is not positive.
    """

    def __init__(
            self,
            in_features: int,
            widths: Sequence[int] = (512,),
            in_dropout: float = 0.,
            hidden_dropout: float = 0.,
            dropout: float = 0.,
            act_layer: str = 'relu',
            device=None,
            dtype=None,
    ):
        if not widths:
            raise ValueError("widths is empty; give the width of each hidden layer, or use the head 'linear'.")
        for width in widths:
            check_positive(widths=width)
        super().__init__(*[
            hidden_block(before, width, hidden_dropout if i else in_dropout, '', act_layer, device, dtype)
            for i, (before, width) in enumerate(zip([in_features, *widths], widths))
        ])
        self.out_features = widths[-1]
        self.dropout = dropout


class PlainHead(ClassifierHead):
    """The two- and three-layer classifiers of the papers' baselines: (N, F) -> (N, C).

    See docs/papers/spinalnet.md, sections 3.2 and 3.3.

    Args:
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C.
        **options: Those of :class:`PlainLayers`.
    """

    hidden_layers = PlainLayers
