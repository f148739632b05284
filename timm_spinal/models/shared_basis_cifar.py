"""ResNets of 32-pixel images whose stages share filter bases, as in the paper on CIFAR-10 and CIFAR-100.

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066 (docs/papers/shared_bases.md, sections 3 and 6). Parameter counts are those of the
paper's code.

S{s}U{u} counts the filters of the first stage, they grow with the width; the suffix d, the paper's asterisk, means two
bases per stage. He's nets of 16 channels are for CIFAR-10, and there alone the paper's orthogonality penalty counts the
unique filters too (docs/papers/shared_bases.md, section 4); ResNet34 of 64 channels is for CIFAR-100.
"""

from typing import Any, Dict

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model

from ._packaged import generate_default_cfgs
from ._shared_blocks import share_basic_stages
from ._shared_model import SHARED_BASIS_PAPER, SharedBasisModel, checkpoint_filter_fn
from ._small_net import build_small_net, small_net_cfg
from .cifar100_resnet import Cifar100ResNet, cifar100_cfg, use_small_stem
from .cifar_resnet import SmallResNet, small_resnet_filter_fn
from .load_weights import build_model
from .shared_basis_resnet import SharedBasisResNet

__all__ = ['SharedBasisCifar100ResNet', 'SharedBasisSmallResNet']

STAGES = ('stages.1', 'stages.2', 'stages.3')


class SharedBasisSmallResNet(SharedBasisModel, SmallResNet):
    """SmallResNet, all but the first block of each stage decomposed over the stage's basis.

    Args:
        depth: Blocks per stage.
        sb_rank: Shared filters s of the first stage, 0 for none (a plain low-rank net); twice as many in the next.
        sb_unique: Unique filters u of a convolution of the first stage, 0 for none (all filters shared).
        sb_double: Two bases per stage, for the first and the second convolution of a block.
        sb_stages: Digits of the stages that are decomposed; the others are SmallResNet's.
        sb_folded: Without the norms that :func:`timm_spinal.fold_bases` folds into the coefficients.
        sb_decay: Whether the bases take weight decay, as in the paper.
        **kwargs: SmallResNet's options.

    Raises:
        ValueError: If there are no filters, more than the width allows, or stages that do not exist.
    """

    plain_cls = SmallResNet
    sb_ortho_unique = True

    def __init__(
            self,
            depth: int,
            sb_rank: int = 16,
            sb_unique: int = 1,
            sb_double: bool = False,
            sb_stages: str = '123',
            sb_folded: bool = False,
            sb_decay: bool = True,
            **kwargs: Any,
    ):
        super().__init__(depth, **kwargs)
        self.sb_decay = sb_decay
        share_basic_stages(self, sb_stages, STAGES, sb_rank, sb_unique, sb_double, sb_folded)

    @torch.jit.ignore
    def init_weights(self) -> None:
        super().init_weights()
        self.init_shared()


class SharedBasisCifar100ResNet(SharedBasisResNet):
    """SharedBasisResNet with the small stem of :class:`Cifar100ResNet`; the same options."""

    plain_cls = Cifar100ResNet

    def __init__(self, layers: Any, **kwargs: Any):
        super().__init__(layers, **kwargs)
        use_small_stem(self)


def small_checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: Any) -> Dict[str, Any]:
    """Names of the paper's CIFAR-10 code to ours; a state dict of our own stays as it is."""
    return small_resnet_filter_fn(checkpoint_filter_fn(state_dict, model), model)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    return build_small_net(
        SharedBasisSmallResNet, variant, pretrained, num_stages=4, pretrained_filter_fn=small_checkpoint_filter_fn,
        **kwargs)


def _create_cifar100(variant: str, pretrained: bool = False, **kwargs: Any) -> SharedBasisCifar100ResNet:
    return build_model(
        SharedBasisCifar100ResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _cfg() -> Dict[str, Any]:
    return small_net_cfg(
        pool_size=(8, 8),
        input_size=(3, 32, 32),
        mean=IMAGENET_DEFAULT_MEAN,  # as in the paper's code, on CIFAR-10 alone
        std=IMAGENET_DEFAULT_STD,
        first_conv='stages.0.conv',
        **SHARED_BASIS_PAPER,
    )


default_cfgs = generate_default_cfgs({
    'resnet32_sb_s8u1_cifar': _cfg(),
    'resnet32_sb_s16u1_cifar': _cfg(),
    'resnet32_sb_s16u1d_cifar': _cfg(),
    'resnet56_sb_s8u1_cifar': _cfg(),
    'resnet56_sb_s16u1_cifar': _cfg(),
    'resnet56_sb_s16u1d_cifar': _cfg(),
    'resnet34_sb_s8u1_cifar100': cifar100_cfg(**SHARED_BASIS_PAPER),
    'resnet34_sb_s16u1_cifar100': cifar100_cfg(**SHARED_BASIS_PAPER),
    'resnet34_sb_s32u1_cifar100': cifar100_cfg(**SHARED_BASIS_PAPER),
})


@register_model
def resnet32_sb_s8u1_cifar(pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    """ResNet32-S8U1; 150,666 parameters."""
    model_args = dict(depth=5, sb_rank=8)
    return _create('resnet32_sb_s8u1_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet32_sb_s16u1_cifar(pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    """ResNet32-S16U1; 197,258 parameters."""
    model_args = dict(depth=5, sb_rank=16)
    return _create('resnet32_sb_s16u1_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet32_sb_s16u1d_cifar(pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    """ResNet32-S16U1*; 245,642 parameters."""
    model_args = dict(depth=5, sb_rank=16, sb_double=True)
    return _create('resnet32_sb_s16u1d_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet56_sb_s8u1_cifar(pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    """ResNet56-S8U1; 201,850 parameters."""
    model_args = dict(depth=9, sb_rank=8)
    return _create('resnet56_sb_s8u1_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet56_sb_s16u1_cifar(pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    """ResNet56-S16U1; 270,842 parameters."""
    model_args = dict(depth=9, sb_rank=16)
    return _create('resnet56_sb_s16u1_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet56_sb_s16u1d_cifar(pretrained: bool = False, **kwargs: Any) -> SharedBasisSmallResNet:
    """ResNet56-S16U1*; 319,226 parameters."""
    model_args = dict(depth=9, sb_rank=16, sb_double=True)
    return _create('resnet56_sb_s16u1d_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s8u1_cifar100(pretrained: bool = False, **kwargs: Any) -> SharedBasisCifar100ResNet:
    """ResNet34-S8U1; 5,865,428 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=8)
    return _create_cifar100('resnet34_sb_s8u1_cifar100', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s16u1_cifar100(pretrained: bool = False, **kwargs: Any) -> SharedBasisCifar100ResNet:
    """ResNet34-S16U1; 6,485,844 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=16)
    return _create_cifar100('resnet34_sb_s16u1_cifar100', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_sb_s32u1_cifar100(pretrained: bool = False, **kwargs: Any) -> SharedBasisCifar100ResNet:
    """ResNet34-S32U1; 7,726,676 parameters."""
    model_args = dict(layers=(3, 4, 6, 3), sb_rank=32)
    return _create_cifar100('resnet34_sb_s32u1_cifar100', pretrained, **dict(model_args, **kwargs))
