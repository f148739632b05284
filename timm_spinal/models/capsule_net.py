"""The capsule network that XnODR and XnIDR are compared with: four convolutions and a capsule layer, no decoder.

Paper: "XnODR and XnIDR: Two Accurate and Fast Fully Connected Layers for Convolutional Neural Networks",
https://arxiv.org/abs/2111.10854 (docs/papers/xnodr_xnidr.md, section 2).

At 28 pixels the last map is 256x4x4, which is cut position by position into 512 capsules of 8. Every capsule has
weights of its own, so maps of larger images are pooled to 4x4 and smaller ones are refused.
"""

from typing import Any, List

import torch
from timm.models import register_model
from torch import nn

from ._packaged import generate_default_cfgs
from ._small_net import SmallNet, build_small_net, small_net_cfg, strip_head_prefix

__all__ = ['CapsuleNet']

GRID = 4
WIDTHS = (128, 128, 256, 256)
BN_EPS = 1e-6


def _stage(in_chs: int, out_chs: int, pool: bool, norm: bool, device=None, dtype=None) -> nn.Sequential:
    dd = {'device': device, 'dtype': dtype}
    layers: List[nn.Module] = [nn.Conv2d(in_chs, out_chs, 3, **dd)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    if norm:
        layers += [nn.BatchNorm2d(out_chs, BN_EPS, **dd), nn.ReLU()]
    return nn.Sequential(*layers)


class CapsuleNet(SmallNet):
    """Four 3x3 convolutions without padding, then a capsule head on the flat map.

    Args:
        head: 'caps', 'xnodr' or 'xnidr'.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: 'avg', or '' for the map.
        drop_rate: Dropout rate on the flat map.
        **head_options: Options of the head, ``head_iterations`` and so on.
    """

    def __init__(
            self,
            head: str = 'caps',
            num_classes: int = 10,
            in_chans: int = 1,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        defaults = dict(primary='vector', norm_momentum=0.1, norm_eps=BN_EPS)
        super().__init__(
            [
                _stage(in_chans, WIDTHS[0], pool=False, norm=True, **dd),
                _stage(WIDTHS[0], WIDTHS[1], pool=True, norm=True, **dd),
                _stage(WIDTHS[1], WIDTHS[2], pool=False, norm=True, **dd),
                _stage(WIDTHS[2], WIDTHS[3], pool=True, norm=False, **dd),
            ],
            channels=WIDTHS,
            reductions=(1, 2, 2, 4),
            head=head,
            head_options=dict(defaults, **strip_head_prefix(head_options)),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            grid=GRID,
            position_major=True,
            **dd,
        )

    def join(self, x: torch.Tensor, outputs: List[torch.Tensor]) -> torch.Tensor:
        features = outputs[-1]
        message = 'The map of this image is smaller than the 4 x 4 grid of capsules; use images of 28 pixels or more.'
        torch._assert(features.shape[2] >= 4, message)
        torch._assert(features.shape[3] >= 4, message)
        return features


default_cfgs = generate_default_cfgs({
    'capsnet_mnist': small_net_cfg(
        pool_size=(GRID, GRID),
        min_input_size=(1, 28, 28),
        paper_ids=('arXiv:1710.09829', 'arXiv:2111.10854'),
    ),
})


@register_model
def capsnet_mnist(pretrained: bool = False, **kwargs: Any) -> CapsuleNet:
    """Capsule network for 28 pixels: 512 x 8 capsules to 10 x 16, three routing iterations; 1,690,544 parameters."""
    return build_small_net(CapsuleNet, 'capsnet_mnist', pretrained, num_stages=len(WIDTHS), **kwargs)
