"""ResNets whose residual stages share filter bases.

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066 (docs/papers/shared_bases.md, section 3). Parameter counts are those of the paper's
code.

ResNetXX-S{s}U{u} has s shared filters and u unique ones per convolution at width 64, both growing with the width; an
asterisk, here the suffix d, means two bases per stage. The first block of each stage is timm's, the stem and the
classifier too.
"""

from typing import Any, Type

import torch
from timm.layers import get_norm_layer
from timm.models import ResNet, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ._packaged import generate_default_cfgs
from ._shared_blocks import SharedBottleneck, share_basic_stages, share_convs, stage_names
from ._shared_model import SharedBasisModel, checkpoint_filter_fn, shared_cfg
from .load_weights import build_model

__all__ = ['SharedBasisResNet', 'SharedBottleneckResNet']

STAGES = ('layer1', 'layer2', 'layer3', 'layer4')


class SharedBasisResNet(SharedBasisModel, ResNet):
    """timm's ResNet of BasicBlocks, all but the first of each stage decomposed over the stage's basis.

    Args:
        layers: Blocks per stage.
        sb_rank: Shared filters s of the first stage, 0 for none (a plain low-rank net); twice as many in the next.
        sb_unique: Unique filters u of a convolution of the first stage, 0 for none (all filters shared).
        sb_double: Two bases per stage, for the first and the second convolution of a block.
        sb_stages: Digits of the stages that are decomposed; the others are timm's.
        sb_folded: Without the norms that :func:`timm_spinal.fold_bases` folds into the coefficients.
        sb_decay: Whether the bases take weight decay, as in the paper.
        zero_init_last: timm's; off, as in the paper.
        **kwargs: timm's ResNet options.

    Raises:
        ValueError: If there are no filters, more than the width allows, or stages that do not exist.
    """

    plain_cls: Type[ResNet] = ResNet

    def __init__(
            self,
            layers: Any,
            sb_rank: int = 32,
            sb_unique: int = 1,
            sb_double: bool = False,
            sb_stages: str = '1234',
            sb_folded: bool = False,
            sb_decay: bool = True,
            zero_init_last: bool = False,
            norm_layer: Any = nn.BatchNorm2d,
            **kwargs: Any,
    ):
        block: Any = BasicBlock  # timm's annotation names its instances
        super().__init__(block, layers, zero_init_last=zero_init_last, norm_layer=norm_layer, **kwargs)
        self.sb_decay = sb_decay
        share_basic_stages(
            self, sb_stages, STAGES, sb_rank, sb_unique, sb_double, sb_folded, get_norm_layer(norm_layer))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights(zero_init_last)
        self.init_shared()


class SharedBottleneckResNet(SharedBasisModel, ResNet):
    """timm's ResNet of Bottlenecks, all but the first of each stage with one shared 3x3 convolution.

    Args:
        layers: Blocks per stage.
        sb_expand: Share the 1x1 expansions too (the paper's "-Shared++").
        sb_stages: Digits of the stages that share; the others are timm's.
        sb_decay: Whether the shared filters take weight decay, as in the paper.
        zero_init_last: timm's; off, as in the paper.
        **kwargs: timm's ResNet options.
    """

    def __init__(
            self,
            layers: Any,
            sb_expand: bool = False,
            sb_stages: str = '1234',
            sb_decay: bool = True,
            zero_init_last: bool = False,
            **kwargs: Any,
    ):
        block: Any = Bottleneck
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)
        self.sb_decay = sb_decay
        names = ('conv2', 'conv3') if sb_expand else ('conv2',)
        for name in stage_names(sb_stages, STAGES):
            setattr(self, name, share_convs(getattr(self, name), SharedBottleneck, names))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights(zero_init_last)
        self.init_shared()


def _create(cls: Type[ResNet], variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    return build_model(cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


default_cfgs = generate_default_cfgs({
    'resnet18_sb_s32u1': shared_cfg(),
    'resnet34_sb_s32u1': shared_cfg(),
    'resnet34_sb_s48u1': shared_cfg(),
    'resnet34_sb_s32u1d': shared_cfg(),
    'resnet34_sb_s48u1d': shared_cfg(),
    'resnet50_sb': shared_cfg(),
    'resnet50_sbpp': shared_cfg(),
    'resnet101_sb': shared_cfg(),
    'resnet101_sbpp': shared_cfg(),
})


@register_model
def resnet18_sb_s32u1(pretrained: bool = False, **kwargs: Any) -> SharedBasisResNet:
    """ResNet18-S32U1; 7,448,292 parameters."""
    model_args = dict(layers=(2, 2, 2, 2), sb_rank=32)
    return _create(SharedBasisResNet, 'resnet18_sb_s32u1', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s32u1(pretrained: bool = False, **kwargs: Any) -> SharedBasisResNet:
    """ResNet34-S32U1; 8,196,056 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=32)
    return _create(SharedBasisResNet, 'resnet34_sb_s32u1', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s48u1(pretrained: bool = False, **kwargs: Any) -> SharedBasisResNet:
    """ResNet34-S48U1; 9,436,888 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=48)
    return _create(SharedBasisResNet, 'resnet34_sb_s48u1', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s32u1d(pretrained: bool = False, **kwargs: Any) -> SharedBasisResNet:
    """ResNet34-S32U1*; 9,762,776 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=32, sb_double=True)
    return _create(SharedBasisResNet, 'resnet34_sb_s32u1d', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s48u1d(pretrained: bool = False, **kwargs: Any) -> SharedBasisResNet:
    """ResNet34-S48U1*; 11,786,968 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=48, sb_double=True)
    return _create(SharedBasisResNet, 'resnet34_sb_s48u1d', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_sb(pretrained: bool = False, **kwargs: Any) -> SharedBottleneckResNet:
    """ResNet50-Shared; 20,506,664 parameters."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create(SharedBottleneckResNet, 'resnet50_sb', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_sbpp(pretrained: bool = False, **kwargs: Any) -> SharedBottleneckResNet:
    """ResNet50-Shared++; 18,262,056 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_expand=True)
    return _create(SharedBottleneckResNet, 'resnet50_sbpp', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_sb(pretrained: bool = False, **kwargs: Any) -> SharedBottleneckResNet:
    """ResNet101-Shared; 29,471,784 parameters."""
    model_args = dict(layers=(3, 4, 23, 3))
    return _create(SharedBottleneckResNet, 'resnet101_sb', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_sbpp(pretrained: bool = False, **kwargs: Any) -> SharedBottleneckResNet:
    """ResNet101-Shared++; 22,770,728 parameters."""
    model_args = dict(layers=(3, 4, 23, 3), sb_expand=True)
    return _create(SharedBottleneckResNet, 'resnet101_sbpp', pretrained, **dict(model_args, **kwargs))
