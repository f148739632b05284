"""He's ResNets of 32-pixel images: three stages of 16, 32 and 64 channels, 6n + 2 layers.

Paper: "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, section 4.2, with its
shortcut A, which has no parameters. The nets of `spinal_cifar.py` are wider and another paper's.
"""

import re
from typing import Any, Dict

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import nn

from ._packaged import generate_default_cfgs
from ._small_net import CIFAR_MEAN, CIFAR_STD, SmallNet, build_small_net, small_net_cfg

__all__ = ['SmallResNet']

CHANNELS = (16, 32, 64)

# names of ImageNet's ResNets, which most code for CIFAR keeps, to SmallResNet's
_NAMES = (
    (r'^conv1\.', 'stages.0.conv.'),
    (r'^bn1\.', 'stages.0.bn.'),
    (r'^layer(\d)\.', r'stages.\1.'),
    (r'^(?:fc|linear)\.', 'head.fc.'),
)


class PadShortcut(nn.Module):
    """Shortcut A: every other row and column, zero channels on both sides: (N, C, H, W) -> (N, C', H / 2, W / 2)."""

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        self.before = (out_chs - in_chs) // 2
        self.behind = out_chs - in_chs - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class SmallResNet(SmallNet):
    """Stem, three stages of n of timm's BasicBlocks, average, linear.

    Args:
        depth: Blocks per stage, n.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout rate on the pooled vector.
    """

    def __init__(
            self,
            depth: int,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        dd: Any = {'device': device, 'dtype': dtype}
        prev_chs = CHANNELS[0]
        stages: list = [ConvNormAct(in_chans, prev_chs, 3, padding=1, **dd)]
        for chs in CHANNELS:
            blocks = []
            for _ in range(depth):
                shortcut = PadShortcut(prev_chs, chs) if prev_chs != chs else None
                blocks.append(BasicBlock(prev_chs, chs, 1 if shortcut is None else 2, shortcut, **dd))
                prev_chs = chs
            stages.append(nn.Sequential(*blocks))
        super().__init__(
            stages,
            channels=(CHANNELS[0], *CHANNELS),
            reductions=(1, 1, 2, 4),
            head='linear',
            head_options={},
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
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def small_resnet_filter_fn(state_dict: Dict[str, torch.Tensor], model: Any) -> Dict[str, torch.Tensor]:
    """Names of the usual code for CIFAR, the papers' too, to ours; a state dict of our own stays as it is."""
    for pattern, replacement in _NAMES:
        state_dict = {re.sub(pattern, replacement, name): value for name, value in state_dict.items()}
    return state_dict


def _create_small_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    return build_small_net(
        SmallResNet, variant, pretrained, num_stages=4, pretrained_filter_fn=small_resnet_filter_fn, **kwargs)


def _cfg() -> Dict[str, Any]:
    return small_net_cfg(
        pool_size=(8, 8),
        input_size=(3, 32, 32),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        first_conv='stages.0.conv',
        paper_ids='arXiv:1512.03385',
    )


default_cfgs = generate_default_cfgs({
    'resnet20_cifar': _cfg(),
    'resnet32_cifar': _cfg(),
    'resnet56_cifar': _cfg(),
})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """He's CIFAR ResNet of 20 layers; 269,722 parameters."""
    return _create_small_resnet('resnet20_cifar', pretrained, **dict(depth=3, **kwargs))


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """He's CIFAR ResNet of 32 layers; 464,154 parameters."""
    return _create_small_resnet('resnet32_cifar', pretrained, **dict(depth=5, **kwargs))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """He's CIFAR ResNet of 56 layers; 853,018 parameters."""
    return _create_small_resnet('resnet56_cifar', pretrained, **dict(depth=9, **kwargs))
