"""A small model of every family and every head, for continuous integration."""

from typing import List

import timm_spinal
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


def representatives() -> List[str]:
    """Names: the table above, and every net that is not a head on one of timm's backbones."""
    headed = {f'{backbone}_{head}' for backbone, head in VARIANTS}
    small_nets = [name for name in timm_spinal.list_models() if name not in headed]
    return [*HEADED, *small_nets]
