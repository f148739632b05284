"""Registered models `ic<timm model>`: rows of one table over :func:`convert_to_ic`.

Paper: "IC Networks: Remodeling the Basic Unit for Convolutional Neural Networks", https://arxiv.org/abs/2102.03495,
which names ResNet-50 alone; the other hosts are ours (spec ic_networks_wld 2.7). `icresnet50` has 25,560,808
parameters, 3,776 more than resnet50.

``pretrained=True`` loads timm's weights of the plain model (tags ``backbone_<timm tag>``) and says that the collision
weights are new. From the weights alone they are chosen so that collisions are rare and the plain model's BatchNorm
statistics nearly fit, see :func:`ic_quiet_start`; :func:`timm_spinal.ic_warm_start` comes nearer with some images. With
``ic_init`` given they start there instead, as from scratch, and the statistics do not fit until they are made anew.
Weights of a whole IC model load with its collisions.
"""

import logging
from functools import partial
from typing import Any, Dict

import torch
from timm.models import resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg
from torch import nn

from ._feature_map import TimmModel
from ._variants import create_backbone, register_variant
from .convert_ic import IC_OPTIONS, convert_to_ic, flat_name
from .fill_weights import LoadedWeights
from .head_variants import register_head_variant
from .ic_quiet_start import ic_quiet_start
from .weight_files import MisfitError

_logger = logging.getLogger(__name__)

BACKBONES = (
    'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnext50_32x4d', 'seresnet50',
    'resnet20_cifar', 'resnet32_cifar', 'resnet56_cifar',
)
IC_PAPER = dict(paper_ids='arXiv:2102.03495')

default_cfgs: Dict[str, DefaultCfg] = {}


def _is_collision(name: str) -> bool:
    return '.ic_' in name


def _load_collision(
        model: TimmModel,
        state_dict: Dict[str, torch.Tensor],
        variant: str,
        quiet: bool,
        whole: bool,
) -> None:
    """Load what the plain model does not have, or say that it is new, and start it quietly where asked for.

    Args:
        model: Has collisions and the plain model's weights.
        state_dict: The weights of the whole model.
        variant: Its name.
        quiet: Whether it is started quietly.
        whole: It has all layers that the weights are for, which ``features_only`` may cut.
    """
    own = {name: value for name, value in model.state_dict().items() if _is_collision(name)}
    given = {flat_name(name): value for name, value in state_dict.items() if _is_collision(name)}
    loaded: LoadedWeights = model.loaded_weights
    if not given:
        if quiet:
            ic_quiet_start(model)
        fit = 'nearly fit' if quiet else 'do not fit'
        loaded.new += own
        _logger.warning(
            f"{variant}: the plain model's weights are loaded, {len(own)} tensors of the collision are new, and "
            f'BatchNorm statistics {fit}: use timm_spinal.ic_warm_start or recalibrate_bn, or train.')
        return
    missing = [name for name in own if flat_name(name) not in given]
    if missing:
        raise MisfitError(
            f"{loaded.source}: the weights lack {len(missing)} keys of the collision, such as '{missing[0]}'.")
    others = given.keys() - {flat_name(name) for name in own} if whole else set()
    wrong = [name for name, value in own.items() if given[flat_name(name)].shape != value.shape]
    if others or wrong:
        raise MisfitError(
            f'{loaded.source}: the weights have {len(others) + len(wrong)} tensors of the collision for which '
            f"{variant} with these options has no place, such as '{min([*others, *wrong])}'; give it the ic_ options "
            'of the weights.')
    model.load_state_dict({name: given[flat_name(name)] for name in own}, strict=False)
    loaded.loaded += len(own)


def _create_ic_variant(
        backbone: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> nn.Module:
    variant = f'ic{backbone}'
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    options = {name[len('ic_'):]: kwargs.pop(name) for name in list(kwargs) if name in IC_OPTIONS}
    model, state_dict = create_backbone(
        backbone, cfg, is_ours=_is_collision, pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    convert_to_ic(model, **options)
    if pretrained:
        quiet = 'init' not in options and options.get('norm') != 'bn'  # which is about half active for any w'
        _load_collision(model, state_dict, variant, quiet, whole=not kwargs.get('features_only'))
    return model


def register_ic_variant(backbone: str) -> str:
    """Make `ic<backbone>` a name that ``timm.create_model`` knows.

    The model takes the backbone's arguments and those of :func:`timm_spinal.convert_to_ic`, prefixed ``ic_``:
    ``ic_scope``, ``ic_depthwise``, ``ic_mode``, ``ic_scale``, ``ic_norm`` and ``ic_init``.

    Args:
        backbone: A timm model name without tag.

    Returns:
        The registered name. Registering it again changes nothing.

    Raises:
        ValueError: If the backbone is unknown, or the name belongs to another model.
    """
    doc = f'{backbone} with inter-layer collision convolutions.'
    create = partial(_create_ic_variant, backbone)
    return register_variant(
        __name__, f'ic{backbone}', backbone, create, doc, instead='convert_to_ic', architecture=f'ic{backbone}',
        **IC_PAPER)


def _register_table() -> None:
    for backbone in BACKBONES:
        register_ic_variant(backbone)
    register_head_variant('icresnet50', 'pspinal')


_register_table()
