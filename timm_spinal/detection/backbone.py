"""A timm backbone with a feature pyramid, as torchvision's detectors take it."""
from collections import OrderedDict
from typing import Any, Sequence

import timm
import torch
import torch.nn as nn
from timm.models import load_model_config_from_hf, parse_model_name
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from timm_spinal.errors import UserError
from timm_spinal.models._timm import load_model_config_from_path
from timm_spinal.models.fill_weights import watch_load
from timm_spinal.models.hub_checksums import check_download
from timm_spinal.models.hub_errors import explain, one_line
from timm_spinal.models.load_weights import create_from_file
from timm_spinal.models.weight_files import WeightsError
from timm_spinal.training.model import check_model_name

_NO_FEATURES = (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, OSError, KeyError)


class TimmPyramid(nn.Module):
    """Features of a timm backbone and a feature pyramid over them (Lin et al. 2017, https://arxiv.org/abs/1612.03144).

    (N, 3, H, W) -> one (N, C, H / s, W / s) for each stride s, the finest first, by the names ``0``, ``1``, ...; those
    of ``extra_blocks`` come after them. Submodules are called as torchvision's: ``body`` and ``fpn``.

    Args:
        body: What `create_body` makes.
        strides: Those of the levels that are wanted.
        out_channels: C, of every level.
        extra_blocks: Makes further levels.
        frozen_bn: The body's BatchNorm neither trains nor counts statistics.

    Raises:
        UserError: The backbone has no feature of any of these strides.
    """

    def __init__(
            self,
            body: Any,
            strides: Sequence[int],
            out_channels: int,
            extra_blocks: ExtraFPNBlock,
            frozen_bn: bool = False,
    ):
        super().__init__()
        found = body.feature_info.reduction()
        # of several features with one stride the deepest, as in the paper
        deepest = {stride: index for index, stride in enumerate(found) if stride in strides}
        if not deepest:
            raise UserError(f'backbone: its features have the strides {", ".join(map(str, found))}, and the detector '
                            f'needs some of {", ".join(map(str, strides))}; choose another')
        self.strides = sorted(deepest)
        self.indices = [deepest[stride] for stride in self.strides]
        self.channels_last = str(getattr(body, 'output_fmt', 'NCHW')).endswith('NHWC')
        self.out_channels = out_channels
        self.body = body
        channels = body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork([channels[i] for i in self.indices], out_channels, extra_blocks)
        self._frozen = [m for m in body.modules() if isinstance(m, _BatchNorm)] if frozen_bn else []
        for norm in self._frozen:
            norm.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> 'TimmPyramid':
        """As any module's; frozen BatchNorm stays in eval mode."""
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> 'OrderedDict[str, torch.Tensor]':
        features = self.body(x)
        levels = [features[i] for i in self.indices]
        if self.channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels)))


def create_body(name: str, pretrained: bool | str, kwargs: dict[str, Any]) -> Any:
    """A timm model that gives its features. Its ``loaded_weights`` say what became of the weights, if it has any.

    Args:
        name: Any model of timm or timm_spinal.
        pretrained: Load the weights of this name, or those of this file.
        kwargs: Further arguments of the model.

    Raises:
        UserError: Unknown model or option, no features, three channels refused, weights that are missing or of another
            model.
    """
    check_model_name(name)
    try:
        if isinstance(pretrained, str):
            body: Any = create_from_file(name, pretrained, features_only=True, **kwargs)
        else:
            with watch_load(name, features=True) as found:
                body = timm.create_model(name, features_only=True, pretrained=pretrained, **kwargs)
            body.loaded_weights = found if pretrained else None
    except WeightsError as e:
        raise UserError(f'backbone {name}: {e}') from e
    except Exception as e:
        if pretrained:  # damaged weights may raise any error
            check_download(f'backbone {name}', dict(file=pretrained) if isinstance(pretrained, str) else name)
        if not isinstance(e, _NO_FEATURES) and explain(e) is None:
            raise
        raise UserError(f'backbone {name}: {explain(e) or one_line(e)}') from e
    if pretrained:
        check_download(f'backbone {name}', body.pretrained_cfg)
    _check_input(name, body)
    return body


@torch.no_grad()
def _check_input(name: str, body: nn.Module) -> None:
    """Refuse a backbone that cannot take images of any size: detectors fill batches up to multiples of 32."""
    training = body.training
    try:
        body.eval()(torch.zeros(1, 3, 64, 96))
    except _NO_FEATURES as e:
        raise UserError(f'backbone {name}: does not take RGB images of any size ({one_line(e)}); choose another, or '
                        'options that allow it, such as dynamic_img_size=True of a ViT') from e
    body.train(training)


def architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments that make a backbone again, also where it was given as ``local-dir:RUN`` or ``hf-hub:ID``."""
    source, where = parse_model_name(name)
    if not source:
        return name, {}
    load = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
    _, arch, kwargs = load(where)
    return arch, dict(kwargs or {})


def freeze_layers(body: Any, trainable_layers: int) -> None:
    """Train the last layers of a backbone only.

    A layer is what lies between two features: of a ResNet the stem and ``layer1`` to ``layer4``, five in all, as
    torchvision counts them.

    Raises:
        UserError: The backbone has not so many.
    """
    names = [name.removeprefix('model.').replace('.', '_') for name, _ in body.named_parameters()]
    starts = []
    for module in body.feature_info.module_name():
        own = [i for i, name in enumerate(names) if name.startswith(module.replace('.', '_') + '_')]
        starts += own[:1]
    starts = sorted({0, *starts})
    if trainable_layers > len(starts):
        raise UserError(f'trainable_layers {trainable_layers}: the backbone has only {len(starts)} layers; give at '
                        f'most {len(starts)}')
    first = starts[len(starts) - trainable_layers] if trainable_layers else len(names)
    for parameter in list(body.parameters())[:first]:
        parameter.requires_grad_(False)
