"""MobileNetV2 whose stages share their pointwise convolutions.

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066 (docs/papers/shared_bases.md, section 3). Shared are the four stages of 32, 64, 96 and
160 channels; the first block of each is ordinary.

The net is timm's mobilenetv2_100. The paper's own has 2,400 parameters more (biases in stem and head, one more 1x1
convolution) and ReLU in place of ReLU6 inside the blocks, so its checkpoints do not fit. Its later form with ECA
attention is not built (docs/papers/shared_bases.md, section 9, B3).
"""

from functools import partial
from typing import Any

from timm.models import EfficientNet, register_model
from torch import nn

from ._packaged import generate_default_cfgs
from ._shared_blocks import SharedInvertedResidual, share_convs
from ._shared_model import SharedBasisModel, shared_cfg
from ._timm import decode_arch_def, resolve_act_layer, resolve_bn_args
from .load_weights import build_model

__all__ = ['SharedBasisMobileNetV2']

ARCH = (
    'ds_r1_k3_s1_c16', 'ir_r2_k3_s2_e6_c24', 'ir_r3_k3_s2_e6_c32', 'ir_r4_k3_s2_e6_c64', 'ir_r3_k3_s1_e6_c96',
    'ir_r3_k3_s2_e6_c160', 'ir_r1_k3_s1_e6_c320',
)
SHARED_STAGES = (2, 3, 4, 5)  # positions in ARCH


class SharedBasisMobileNetV2(SharedBasisModel, EfficientNet):
    """timm's mobilenetv2_100, all but the first block of four stages with one shared 1x1 expansion.

    Args:
        sb_project: Share the 1x1 projections too (the paper's "-Shared++").
        sb_decay: Whether the shared filters take weight decay, as in the paper.
        **kwargs: timm's EfficientNet options.
    """

    def __init__(self, sb_project: bool = False, sb_decay: bool = True, **kwargs: Any):
        norm_layer = kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
        super().__init__(
            decode_arch_def([[block] for block in ARCH]),
            norm_layer=norm_layer,
            act_layer=resolve_act_layer(kwargs, 'relu6'),
            **kwargs,
        )
        self.sb_decay = sb_decay
        names = ('conv_pw', 'conv_pwl') if sb_project else ('conv_pw',)
        for i in SHARED_STAGES:
            stage: Any = self.blocks[i]
            self.blocks[i] = share_convs(stage, SharedInvertedResidual, names)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> SharedBasisMobileNetV2:
    feature_cfg = dict(flatten_sequential=True)
    return build_model(SharedBasisMobileNetV2, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs({
    name: shared_cfg(interpolation='bicubic', first_conv='conv_stem', classifier='classifier')
    for name in ('mobilenetv2_100_sb', 'mobilenetv2_100_sbpp')
})


@register_model
def mobilenetv2_100_sb(pretrained: bool = False, **kwargs: Any) -> SharedBasisMobileNetV2:
    """MobileNetV2-Shared on timm's net; 3,240,680 parameters."""
    return _create('mobilenetv2_100_sb', pretrained, **kwargs)


@register_model
def mobilenetv2_100_sbpp(pretrained: bool = False, **kwargs: Any) -> SharedBasisMobileNetV2:
    """MobileNetV2-Shared++ on timm's net; 2,976,488 parameters."""
    return _create('mobilenetv2_100_sbpp', pretrained, **dict(dict(sb_project=True), **kwargs))
