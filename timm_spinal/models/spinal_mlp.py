"""Spinal nets without convolutions: progressive layers on flat images, and the two-group regression net.

Papers: "ProgressiveSpinalNet architecture for FC layers", https://arxiv.org/abs/2103.11373
(docs/papers/progressive_spinalnet.md, section 3) and "SpinalNet: Deep Neural Network with Gradual Input",
https://arxiv.org/abs/2007.03347 (docs/papers/spinalnet.md, section 3.5).

As timm models: an image becomes one vector of features, that is a map of one position, (N, F, 1, 1), and every hidden
layer is one level of features. The regression nets take their eight numbers as the channels of a one-pixel image,
(N, 8, 1, 1), and give ``num_classes`` = 1 output; other numbers of inputs are ``in_chans``.

What differs from the scripts: the regression net has six distinct layers, where the script applies its third and fourth
twice and never uses the two that it declares last (docs/papers/spinalnet.md, section 6, D2). The MNIST script ends in
log_softmax, here are logits.
"""

from typing import Any, Dict, List, Sequence

import torch
from timm.models import checkpoint, register_model
from torch import nn

from ..layers import create_head
from ..layers.classifier_head import hidden_block
from ._packaged import generate_default_cfgs
from ._small_heads import GridPool
from ._small_net import (
    PROGRESSIVE_PAPER,
    SPINAL_PAPER,
    SmallNet,
    build_small_net,
    small_net_cfg,
    strip_head_prefix,
)
from .load_weights import build_model

__all__ = ['FlatMlp', 'FlatSpinalNet']


class FlatLayer(nn.Module):
    """A hidden layer as a stage: (N, F, 1, 1) -> (N, W, 1, 1)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.flatten(1))[:, :, None, None]


class Flatten(nn.Module):
    """(N, C, H, W) -> (N, C * grid * grid, 1, 1), channel by channel, pooled to the grid where the image is larger."""

    def __init__(self, grid: int):
        super().__init__()
        self.pool = GridPool('avg', grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)[:, :, None, None]


class FlatMlp(SmallNet):
    """Plain multi-layer perceptron on the flat image.

    The levels of features are the first linear, and each hidden layer behind its activation.

    Args:
        widths: Width of each hidden layer.
        grid: Side of the image; others are pooled to it.
        norm_layer: timm name of a norm behind each hidden linear, '' for none.
        act_layer: timm name of the activation.
        num_classes: Number of outputs.
        in_chans: Input channels.
        global_pool: As in timm; the map has one position.
        drop_rate: Dropout rate in front of the last linear.
    """

    def __init__(
            self,
            widths: Sequence[int],
            grid: int = 28,
            norm_layer: str = 'batchnorm1d',
            act_layer: str = 'relu',
            num_classes: int = 10,
            in_chans: int = 1,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        blocks = [
            hidden_block(before, width, norm_layer=norm_layer, act_layer=act_layer, **dd)
            for before, width in zip((in_chans * grid ** 2, *widths), widths)
        ]
        stages = [nn.Sequential(Flatten(grid), FlatLayer(blocks[0][:1])), FlatLayer(blocks[0][1:])]
        super().__init__(
            stages + [FlatLayer(block) for block in blocks[1:]],
            channels=(widths[0], *widths),
            reductions=[grid] * (len(widths) + 1),
            head='linear',
            head_options={},
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        return dict(blocks=r'^stages\.(\d+)')


class FlatSpinalNet(SmallNet):
    """The hidden layers of a spinal or progressive head on the flat image, and one linear.

    The levels of features are what the layers so far have put together, [h_0 .. h_i] or z_{i+1}.

    Args:
        head: 'spinal' or 'pspinal'.
        grid: Side of the image; others are pooled to it.
        num_classes: Number of outputs.
        in_chans: Input channels.
        global_pool: As in timm; the map has one position.
        drop_rate: Dropout rate in front of the last linear, beside the head's own.
        **head_options: Options of the head, ``head_width`` and so on.
    """

    def __init__(
            self,
            head: str = 'pspinal',
            grid: int = 28,
            num_classes: int = 10,
            in_chans: int = 1,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
            **head_options: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        made = create_head(head, in_chans * grid ** 2, 0, **strip_head_prefix(head_options), **dd)
        layers: Any = made.hidden
        num_layers = 1 + len(layers.blocks) * getattr(layers, 'repeats', 1)
        width = layers.first.fc.out_features
        channels = [layers.out_features - width * (num_layers - 1 - i) for i in range(num_layers)]
        super().__init__(
            [Flatten(grid), FlatLayer(layers)],
            channels=channels,
            reductions=[grid] * num_layers,
            head='linear',
            head_options={},
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.head.drop.p = made.drop.p
        self.level_chs: List[int] = channels

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        return dict(first=r'^stages\.1\.block\.first', blocks=r'^stages\.1\.block\.blocks\.(\d+)')

    def forward_stages(self, x: torch.Tensor, last: int) -> List[torch.Tensor]:
        x = self.stages[0](x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint(self.stages[1], x)
        else:
            x = self.stages[1](x)
        return [x[:, :chs] for chs in self.level_chs[:last + 1]]

    def _prune_stages(self, last: int) -> None:
        layers: Any = self.stages[1].block
        if getattr(layers, 'repeats', 1) > 1:  # one shared block
            layers.repeats = last
        layers.blocks = layers.blocks[:last]
        layers.out_features = self.level_chs[last]
        self.level_chs = self.level_chs[:last + 1]


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Without the last linear, if it sees the pixels and their number differs, as timm does for input layers."""
    weight = state_dict.get('head.fc.weight')
    if weight is not None and weight.shape[1] != model.head_hidden_size:
        return {name: value for name, value in state_dict.items() if not name.startswith('head.fc.')}
    return state_dict


def _create_flat_mlp(variant: str, pretrained: bool = False, **kwargs: Any) -> FlatMlp:
    num_stages = 1 + len(kwargs['widths'])
    return build_small_net(FlatMlp, variant, pretrained, num_stages=num_stages, **kwargs)


def _create_flat_spinal(variant: str, pretrained: bool = False, **kwargs: Any) -> FlatSpinalNet:
    # the levels are slices of one output, no modules that timm's default feature extractor could cut out
    feature_cfg = dict(out_indices=tuple(range(kwargs['head_layers'])), feature_cls='getter')
    return build_model(
        FlatSpinalNet,
        variant,
        pretrained,
        feature_cfg=feature_cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def _input_layers(num_layers: int) -> List[str]:
    return ['stages.1.block.first.fc', *(f'stages.1.block.blocks.{i}.fc' for i in range(num_layers - 1))]


_FLAT_IMAGE: Dict[str, Any] = dict(
    PROGRESSIVE_PAPER, pool_size=(1, 1), paper_ids=(PROGRESSIVE_PAPER['paper_ids'], SPINAL_PAPER['paper_ids']))
_EIGHT_NUMBERS: Dict[str, Any] = dict(
    pool_size=(1, 1), num_classes=1, input_size=(8, 1, 1), mean=(0.,), std=(1.,), **SPINAL_PAPER)

default_cfgs = generate_default_cfgs({
    'spinal_mlp': small_net_cfg(**_FLAT_IMAGE, first_conv=_input_layers(4)),
    'spinal_mlp_plain': small_net_cfg(**_FLAT_IMAGE, first_conv='stages.0.1.block.fc'),
    'spinal_regression': small_net_cfg(**_EIGHT_NUMBERS, first_conv=_input_layers(6)),
    'spinal_regression_plain': small_net_cfg(**_EIGHT_NUMBERS, first_conv='stages.0.1.block.fc'),
})


@register_model
def spinal_mlp(pretrained: bool = False, **kwargs: Any) -> FlatSpinalNet:
    """Progressive net on 784 pixels, 4 layers, W = 128, BatchNorm, skip dropout 0.2; 514,218 parameters."""
    model_args = dict(head='pspinal', head_layers=4, head_preset='vanilla_mnist')
    return _create_flat_spinal('spinal_mlp', pretrained, **dict(model_args, **kwargs))


@register_model
def spinal_mlp_plain(pretrained: bool = False, **kwargs: Any) -> FlatMlp:
    """Control of ``spinal_mlp``, of equal depth and nearest size, W = 301; 514,419 parameters. Not in the paper."""
    return _create_flat_mlp('spinal_mlp_plain', pretrained, **dict(dict(widths=(301,) * 4), **kwargs))


@register_model
def spinal_regression(pretrained: bool = False, **kwargs: Any) -> FlatSpinalNet:
    """Eight numbers in two groups of four, 6 layers, W = 50, LeakyReLU 0.01, one output; 14,301 parameters."""
    model_args = dict(
        head='spinal', grid=1, head_layers=6, head_width=50, head_dropout=0., head_norm_layer='',
        head_act_layer='leaky_relu')
    return _create_flat_spinal('spinal_regression', pretrained, **dict(model_args, **kwargs))


@register_model
def spinal_regression_plain(pretrained: bool = False, **kwargs: Any) -> FlatMlp:
    """The paper's baseline of ``spinal_regression``, 8-200-100-1 with LeakyReLU; 22,001 parameters."""
    model_args = dict(widths=(200, 100), grid=1, norm_layer='', act_layer='leaky_relu')
    return _create_flat_mlp('spinal_regression_plain', pretrained, **dict(model_args, **kwargs))
