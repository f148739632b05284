"""VGG-5 for 28-pixel images, with the plain, the spinal and the progressive spinal classifier.

Papers: "SpinalNet: Deep Neural Network with Gradual Input", https://arxiv.org/abs/2007.03347
and "ProgressiveSpinalNet architecture for FC layers", https://arxiv.org/abs/2103.11373 (docs/papers/spinalnet.md,
section 3.3, and docs/papers/progressive_spinalnet.md, section 3).

Four groups of convolutions and a classifier. The scripts flatten the last map, which is 256x1x1 at 28x28 and at no
other size; here it is pooled globally, which is the same at 28x28 and works from 16 pixels up. They end in
log_softmax, these models in logits: cross entropy on either is equal.
"""

from typing import Any

from timm.layers import ConvNormAct
from timm.models import register_model
from torch import nn

from ._packaged import generate_default_cfgs
from ._small_net import PROGRESSIVE_PAPER, SPINAL_PAPER, SmallNet, build_small_net, small_net_cfg, strip_head_prefix

__all__ = ['Vgg5']

GROUPS = ((64, 64), (128, 128), (256, 256, 256), (256, 256, 256))


def vgg_group(in_chs: int, channels, device=None, dtype=None) -> nn.Sequential:
    """3x3 convolutions with BatchNorm and ReLU, then 2x2 max pooling."""
    dd = {'device': device, 'dtype': dtype}
    layers = [
        ConvNormAct(before, after, 3, padding=1, bias=True, **dd)
        for before, after in zip((in_chs, *channels), channels)
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class Vgg5(SmallNet):
    """VGG-5 with any head; 3,508,416 parameters before it (one input channel).

    Args:
        head: 'linear', 'mlp', 'spinal' or 'pspinal'.
        num_classes: Number of classes.
        in_chans: Input channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout rate on the pooled vector.
        **head_options: Options of the head, ``head_width`` and so on.
    """

    def __init__(
            self,
            head: str = 'mlp',
            num_classes: int = 10,
            in_chans: int = 1,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        widths = [group[-1] for group in GROUPS]
        super().__init__(
            [vgg_group(before, group, **dd) for before, group in zip((in_chans, *widths), GROUPS)],
            channels=widths,
            reductions=(2, 4, 8, 16),
            head=head,
            head_options=strip_head_prefix(head_options),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')


def _create_vgg5(variant: str, pretrained: bool = False, **kwargs: Any) -> Vgg5:
    return build_small_net(Vgg5, variant, pretrained, num_stages=len(GROUPS), **kwargs)


def _cfg(**kwargs: Any):
    return small_net_cfg(pool_size=(1, 1), **dict(first_conv='stages.0.0.conv', min_input_size=(1, 16, 16), **kwargs))


default_cfgs = generate_default_cfgs({
    'vgg5': _cfg(**SPINAL_PAPER),
    'vgg5_spinal': _cfg(**SPINAL_PAPER),
    'vgg5_pspinal': _cfg(**PROGRESSIVE_PAPER),
})


@register_model
def vgg5(pretrained: bool = False, **kwargs: Any) -> Vgg5:
    """VGG-5 with the plain head D0.5-Linear 512-BN-ReLU-D0.5-Linear; 3,646,154 parameters."""
    model_args = dict(head='mlp', head_width=512, head_dropout=0.5, head_norm_layer='batchnorm1d')
    return _create_vgg5('vgg5', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg5_spinal(pretrained: bool = False, **kwargs: Any) -> Vgg5:
    """VGG-5 with the spinal head, W = 128, BatchNorm, dropout 0.5; 3,629,770 parameters."""
    model_args = dict(head='spinal', head_preset='mnist_vgg5')
    return _create_vgg5('vgg5_spinal', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg5_pspinal(pretrained: bool = False, **kwargs: Any) -> Vgg5:
    """VGG-5 with the progressive head, W = 64, skip dropout 0.2 (KMNIST, EMNIST digits); 3,603,914 parameters.

    ``head_preset`` 'qmnist' and 'emnist_letters' are the paper's settings for those data.
    """
    model_args = dict(head='pspinal', head_preset='kmnist')
    return _create_vgg5('vgg5_pspinal', pretrained, **dict(model_args, **kwargs))
