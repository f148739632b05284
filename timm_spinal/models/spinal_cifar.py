"""The CIFAR CNN, VGG and ResNet of the SpinalNet paper, with plain and spinal classifiers.

Paper: "SpinalNet: Deep Neural Network with Gradual Input", https://arxiv.org/abs/2007.03347 (docs/papers/spinalnet.md,
section 3.3).

The scripts flatten maps of 32x32 images, 256x4x4 and 512x1x1; here maps are pooled to the same grids first, which is
the identity at 32x32 and lets other sizes in. The ResNet differs from He's CIFAR ResNets (and from timm's): widths 32
to 256, a 3x3 convolution in the downsample branch, no ReLU behind the addition.
"""

from typing import Any, Dict, List, Sequence

import torch
from timm.layers import ConvNormAct
from timm.models import register_model
from timm.models.vgg import cfgs as vgg_cfgs
from torch import nn

from ._packaged import generate_default_cfgs
from ._small_net import (
    CIFAR_MEAN,
    CIFAR_STD,
    SPINAL_PAPER,
    SmallNet,
    build_small_net,
    small_net_cfg,
    strip_head_prefix,
)

__all__ = ['CifarCnn', 'CifarVgg', 'CifarResNet', 'CifarBasicBlock']

CNN_CHANNELS = ((32, 64), (128, 128), (256, 256))
CNN_DROPOUT = (0., 0.05, 0.)
RESNET_CHANNELS = (32, 64, 128, 256)


class CifarCnn(SmallNet):
    """Three blocks of two 3x3 convolutions, then any head on 256x4x4; 1,126,912 parameters before it.

    Args:
        head: 'plain' (dropout, Linear 1024, ReLU, Linear 512, ReLU, dropout), 'linear', 'mlp', 'spinal' or 'pspinal'.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: timm's pooling type, here from the last map to a 4x4 grid.
        drop_rate: Dropout rate on the pooled vector.
        **head_options: Options of the head, ``head_width`` and so on.
    """

    def __init__(
            self,
            head: str = 'spinal',
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        stages = []
        prev_chs = in_chans
        for (first_chs, chs), dropout in zip(CNN_CHANNELS, CNN_DROPOUT):
            stages.append(nn.Sequential(
                ConvNormAct(prev_chs, first_chs, 3, padding=1, bias=True, **dd),
                nn.Conv2d(first_chs, chs, 3, padding=1, **dd),  # no BatchNorm behind the second convolution
                nn.ReLU(),
                nn.MaxPool2d(2),
                *([nn.Dropout2d(dropout)] if dropout else []),
            ))
            prev_chs = chs
        super().__init__(
            stages,
            channels=[chs for _, chs in CNN_CHANNELS],
            reductions=(2, 4, 8),
            head=head,
            head_options=strip_head_prefix(head_options),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            grid=4,
            **dd,
        )


class CifarVgg(SmallNet):
    """torchvision's VGG with BatchNorm for 32x32 images, whose last map is one position of 512 channels, with any head.

    Args:
        depth: Which network: 11, 13, 16 or 19.
        head: 'plain' (Linear 4096, ReLU, dropout, twice), 'linear', 'mlp', 'spinal' or 'pspinal'.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout rate on the pooled vector.
        **head_options: Options of the head, ``head_width`` and so on.
    """

    def __init__(
            self,
            depth: int,
            head: str = 'spinal',
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        stages: List[nn.Module] = []
        channels: List[int] = []
        layers: List[nn.Module] = []
        prev_chs = in_chans
        for chs in vgg_cfgs[f'vgg{depth}']:
            if isinstance(chs, str):  # 'M', a pooling
                stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
                channels.append(prev_chs)
                layers = []
            else:
                layers.append(ConvNormAct(prev_chs, chs, 3, padding=1, bias=True, **dd))
                prev_chs = chs
        super().__init__(
            stages,
            channels=channels,
            reductions=(2, 4, 8, 16, 32),
            head=head,
            head_options=strip_head_prefix(head_options),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class CifarBasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus shortcut, no ReLU behind the addition: (N, C, H, W) -> (N, C', H/s, W/s)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = ConvNormAct(in_chs, out_chs, 3, stride=stride, padding=1, **dd)
        self.conv2 = ConvNormAct(out_chs, out_chs, 3, padding=1, apply_act=False, **dd)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.downsample = ConvNormAct(in_chs, out_chs, 3, stride=stride, padding=1, apply_act=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x)) + self.downsample(x)


class CifarResNet(SmallNet):
    """CIFAR ResNet with any head.

    A spinal head has the spatial split: the last map is pooled to 2x2, and its four 256-vectors at (0,0), (0,1), (1,0),
    (1,1) are the four input splits, one per layer. Other heads get the globally pooled vector.

    Args:
        depths: Blocks per stage.
        head: 'linear', 'mlp', 'spinal' or 'pspinal'.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: timm's pooling type; the paper's is 'max'.
        drop_rate: Dropout rate on the pooled vector.
        **head_options: Options of the head, ``head_width`` and so on.
    """

    def __init__(
            self,
            depths: Sequence[int],
            head: str = 'linear',
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'max',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        stem_chs = RESNET_CHANNELS[0]
        stages = [nn.Sequential(ConvNormAct(in_chans, stem_chs, 3, padding=1, **dd), nn.Dropout2d(0.02))]
        prev_chs = stem_chs
        for i, (chs, depth) in enumerate(zip(RESNET_CHANNELS, depths)):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            in_chs = [prev_chs] + [chs] * (depth - 1)
            stages.append(nn.Sequential(*[
                CifarBasicBlock(before, chs, stride, **dd) for before, stride in zip(in_chs, strides)]))
            prev_chs = chs
        spatial_split = head == 'spinal'
        super().__init__(
            stages,
            channels=(stem_chs, *RESNET_CHANNELS),
            reductions=(1, 1, 2, 4, 8),
            head=head,
            head_options=strip_head_prefix(head_options),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            grid=2 if spatial_split else 1,
            position_major=spatial_split,
            **dd,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def _create_cifar(net_cls, variant: str, pretrained: bool = False, num_stages: int = 3, **kwargs: Any) -> Any:
    return build_small_net(net_cls, variant, pretrained, num_stages=num_stages, **kwargs)


def _cfg(num_classes: int = 10, pool_size: int = 4, **kwargs: Any) -> Dict[str, Any]:
    return small_net_cfg(
        pool_size=(pool_size, pool_size),
        num_classes=num_classes,
        input_size=(3, 32, 32),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        first_conv='stages.0.0.conv',
        **SPINAL_PAPER,
        **kwargs,
    )


default_cfgs = generate_default_cfgs({
    'cifarcnn': _cfg(),
    'cifarcnn_spinal': _cfg(),
    **{f'vgg{depth}_bn_cifar{head}': _cfg(pool_size=1, min_input_size=(3, 32, 32))
       for depth in (11, 13, 16, 19) for head in ('', '_spinal')},
    'resnet18_cifar': _cfg(),
    'resnet18_cifar_spinal': _cfg(),
    'resnet34_cifar': _cfg(num_classes=100),
    'resnet34_cifar_spinal': _cfg(num_classes=100),
})

_SPINAL: Dict[str, Any] = dict(head='spinal', head_layers=4, head_dropout=0., head_norm_layer='')
_VGG: Dict[str, Any] = dict(
    num_stages=5, head='plain', head_widths=(4096, 4096), head_hidden_dropout=0.5, head_dropout=0.5)
_VGG_SPINAL: Dict[str, Any] = dict(num_stages=5, head='spinal', head_preset='cifar_vgg')
_RESNET18: Dict[str, Any] = dict(depths=(2, 2, 2, 2), num_stages=5)
_RESNET34: Dict[str, Any] = dict(depths=(3, 4, 6, 3), num_stages=5)


@register_model
def cifarcnn(pretrained: bool = False, **kwargs: Any) -> CifarCnn:
    """CIFAR CNN with its three-layer classifier; 5,852,170 parameters."""
    model_args = dict(head='plain', head_widths=(1024, 512), head_in_dropout=0.1, head_dropout=0.1)
    return _create_cifar(CifarCnn, 'cifarcnn', pretrained, **dict(model_args, **kwargs))


@register_model
def cifarcnn_spinal(pretrained: bool = False, **kwargs: Any) -> CifarCnn:
    """CIFAR CNN with a spinal head, W = 128, dropout 0.1; 2,230,282 parameters.

    CIFAR-100 in the paper: ``num_classes=100, head_width=256``, 3,524,196 parameters.
    """
    model_args = dict(head='spinal', head_preset='cifar_cnn')
    return _create_cifar(CifarCnn, 'cifarcnn_spinal', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-11 for CIFAR with its three-layer classifier; 28,149,514 parameters."""
    return _create_cifar(CifarVgg, 'vgg11_bn_cifar', pretrained, **dict(_VGG, depth=11, **kwargs))


@register_model
def vgg11_bn_cifar_spinal(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-11 for CIFAR with a spinal head, W = 512, dropout 0.5, no norm; 10,559,242 parameters."""
    return _create_cifar(CifarVgg, 'vgg11_bn_cifar_spinal', pretrained, **dict(_VGG_SPINAL, depth=11, **kwargs))


@register_model
def vgg13_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-13 for CIFAR with its three-layer classifier; 28,334,410 parameters."""
    return _create_cifar(CifarVgg, 'vgg13_bn_cifar', pretrained, **dict(_VGG, depth=13, **kwargs))


@register_model
def vgg13_bn_cifar_spinal(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-13 for CIFAR with a spinal head, W = 512, dropout 0.5, no norm; 10,744,138 parameters."""
    return _create_cifar(CifarVgg, 'vgg13_bn_cifar_spinal', pretrained, **dict(_VGG_SPINAL, depth=13, **kwargs))


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-16 for CIFAR with its three-layer classifier; 33,646,666 parameters."""
    return _create_cifar(CifarVgg, 'vgg16_bn_cifar', pretrained, **dict(_VGG, depth=16, **kwargs))


@register_model
def vgg16_bn_cifar_spinal(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-16 for CIFAR with a spinal head, W = 512, dropout 0.5, no norm; 16,056,394 parameters."""
    return _create_cifar(CifarVgg, 'vgg16_bn_cifar_spinal', pretrained, **dict(_VGG_SPINAL, depth=16, **kwargs))


@register_model
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-19 for CIFAR with its three-layer classifier; 38,958,922 parameters."""
    return _create_cifar(CifarVgg, 'vgg19_bn_cifar', pretrained, **dict(_VGG, depth=19, **kwargs))


@register_model
def vgg19_bn_cifar_spinal(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-19 for CIFAR with a spinal head, W = 512, dropout 0.5, no norm; 21,368,650 parameters."""
    return _create_cifar(CifarVgg, 'vgg19_bn_cifar_spinal', pretrained, **dict(_VGG_SPINAL, depth=19, **kwargs))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The paper's CIFAR-10 ResNet, linear classifier; 3,141,674 parameters."""
    return _create_cifar(CifarResNet, 'resnet18_cifar', pretrained, **dict(_RESNET18, **kwargs))


@register_model
def resnet18_cifar_spinal(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The paper's CIFAR-10 ResNet, spinal head with the spatial split, W = 256; 3,609,130 parameters."""
    model_args = dict(_RESNET18, head_width=256, head_splits=4, **_SPINAL)
    return _create_cifar(CifarResNet, 'resnet18_cifar_spinal', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The paper's CIFAR-100 ResNet, linear classifier; 5,693,700 parameters."""
    return _create_cifar(CifarResNet, 'resnet34_cifar', pretrained, **dict(_RESNET34, **kwargs))


@register_model
def resnet34_cifar_spinal(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The paper's CIFAR-100 ResNet, spinal head with the spatial split, W = 512; 7,185,668 parameters."""
    model_args = dict(_RESNET34, head_width=512, head_splits=4, **_SPINAL)
    return _create_cifar(CifarResNet, 'resnet34_cifar_spinal', pretrained, **dict(model_args, **kwargs))
