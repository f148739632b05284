"""A small model of every family and every head, for continuous integration."""

from typing import List

import timm_spinal
from timm_spinal import CONVOLUTIONS
from timm_spinal.models.head_variants import VARIANTS

# one row for each timm family among the backbones; heads take turns
HEADED = (
    'resnet18_spinal',
    'vgg11_bn_pspinal',
    'densenet121_spinal',
    'mobilenetv2_100_spinal',
    'mobilenetv3_large_100_pspinal',
    'convnext_tiny_spinal',
    'regnety_016_pspinal',
    'vit_small_patch16_224_pspinal',
    'swin_tiny_patch4_window7_224_spinal',
    'mobilenetv2_100_xnodr',
    'mobilenetv3_large_100_caps',
    'resnet18_xnidr',
)

# one for each kind of block with shared filters
SHARED = (
    'resnet18_sb_s32u1',
    'resnet50_sbpp',
    'mobilenetv2_100_sbpp',
    'resnet32_sb_s16u1d_cifar',
    'resnet34_sb_s8u1_cifar100',
)

# one for each kind of block that convolutions are replaced in
HOSTS = ('resnet18', 'resnext50_32x4d', 'seresnet50')


def representatives() -> List[str]:
    """Names: the tables above, and every small net."""
    left_out = {f'{backbone}_{head}' for backbone, head in VARIANTS}
    left_out.update(timm_spinal.list_models('*_sb*'))
    converted = [f'{row.prefix}{host}' for row in CONVOLUTIONS.values() for host in HOSTS if host in row.backbones]
    for prefix in CONVOLUTIONS:
        left_out.update(name for name in timm_spinal.list_models(f'{prefix}*') if not name.endswith('_cifar'))
    small_nets = [name for name in timm_spinal.list_models() if name not in left_out]
    return [*HEADED, *SHARED, *converted, *small_nets]
