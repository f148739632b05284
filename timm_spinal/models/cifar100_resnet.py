"""ResNets of timm's widths on 32-pixel images: a 3x3 stem without stride and without pooling.

The host of the CIFAR-100 experiments with shared filter bases (docs/papers/shared_bases.md, sections 3 and 6).
`resnet34_cifar` is another paper's net, and narrower.
"""

from typing import Any, Dict

import torch
from timm.models import ResNet, register_model
from timm.models.resnet import BasicBlock
from torch import nn

from ._packaged import generate_default_cfgs
from ._small_net import CIFAR_MEAN, CIFAR_STD
from .load_weights import build_model

__all__ = ['Cifar100ResNet', 'use_small_stem']


def use_small_stem(model: Any) -> None:
    """Give a ResNet of timm's, in place, a stem that keeps the size of the image: 3x3, stride 1, no pooling."""
    conv = model.conv1
    model.conv1 = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1, bias=False, device=conv.weight.device,
        dtype=conv.weight.dtype)
    nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    for i, info in enumerate(model.feature_info):
        info['reduction'] //= 2 if i == 0 else 4


class Cifar100ResNet(ResNet):
    """timm's ResNet of BasicBlocks with a small stem.

    Args:
        layers: Blocks per stage.
        zero_init_last: timm's; off, as in the paper.
        **kwargs: timm's ResNet options.
    """

    def __init__(self, layers: Any, zero_init_last: bool = False, **kwargs: Any):
        block: Any = BasicBlock  # timm's annotation names its instances
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)
        use_small_stem(self)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights(zero_init_last)


def cifar100_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Pretrained config of a ResNet on CIFAR-100."""
    cfg: Dict[str, Any] = dict(
        num_classes=100, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, interpolation='bilinear',
        mean=CIFAR_MEAN, std=CIFAR_STD, first_conv='conv1', classifier='fc',
    )
    return dict(cfg, **kwargs)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> Cifar100ResNet:
    return build_model(Cifar100ResNet, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs({
    name: cifar100_cfg(paper_ids='arXiv:1512.03385') for name in ('resnet18_cifar100', 'resnet34_cifar100')
})


@register_model
def resnet18_cifar100(pretrained: bool = False, **kwargs: Any) -> Cifar100ResNet:
    """ResNet-18 with a small stem; 11,220,132 parameters."""
    return _create('resnet18_cifar100', pretrained, **dict(dict(layers=(2, 2, 2, 2)), **kwargs))


@register_model
def resnet34_cifar100(pretrained: bool = False, **kwargs: Any) -> Cifar100ResNet:
    """ResNet-34 with a small stem; 21,328,292 parameters."""
    return _create('resnet34_cifar100', pretrained, **dict(dict(layers=(3, 4, 6, 3)), **kwargs))
