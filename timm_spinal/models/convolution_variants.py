"""Registered models `<prefix><timm model>`, such as `icresnet50`: the rows of `CONVOLUTIONS` in models of timm.

``pretrained=True`` loads timm's weights of the plain model (tags ``backbone_<timm tag>``) and says that the tensors
which the convolution adds are new. Where the row has a start, they are chosen from the weights alone so that the plain
model's BatchNorm statistics nearly fit. Weights of a whole converted model load with what the convolution adds.

IC Networks name ResNet-50 alone, the other hosts are ours (docs/papers/ic_networks.md, section 4). `icresnet50` has
25,560,808 parameters, 3,776 more than resnet50. Its collisions start by
:func:`timm_spinal.models.ic_collisions.ic_quiet_start`; :func:`timm_spinal.ic_warm_start` comes nearer to the plain
model with some images. With ``ic_init`` given they start there instead, as from scratch, and the statistics do not fit
until they are re-estimated.
"""

import logging
from functools import partial
from typing import Any, Dict

import torch
from timm.models import DefaultCfg, resolve_pretrained_cfg
from torch import nn

from ._feature_map import TimmModel
from ._variants import create_backbone, register_variant
from .convert import convert, flat_name
from .convolutions import CONVOLUTIONS, Convolution
from .fill_weights import LoadedWeights
from .head_variants import register_head_variant
from .weight_files import MisfitError

_logger = logging.getLogger(__name__)

default_cfgs: Dict[str, DefaultCfg] = {}


def create_converted(
        backbone: str,
        convolution: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> nn.Module:
    """The entrypoint of `<prefix><backbone>`: timm's model, with convolutions of the row in the place of its own.

    Args:
        backbone: A name of timm's.
        convolution: A row of `CONVOLUTIONS`.
        pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir: As timm passes them to every entrypoint.
        **kwargs: The backbone's arguments and the row's options.
    """
    row = CONVOLUTIONS[convolution]
    variant = f'{row.prefix}{backbone}'
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    options = {name[len(row.prefix) + 1:]: kwargs.pop(name) for name in row.options if name in kwargs}
    model, state_dict = create_backbone(
        backbone, cfg, row.adds, pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    convert(model, convolution, **options)
    if pretrained:
        added = {flat_name(name): value for name, value in state_dict.items() if row.adds(name)}
        if added:
            _load_added(model, added, row, variant, whole=not kwargs.get('features_only'))
        else:
            _start_added(model, row, variant, options)
    return model


def _start_added(model: TimmModel, row: Convolution, variant: str, options: Dict[str, Any]) -> None:
    """Start the tensors that the convolution adds to a model with the plain model's weights, and say that they are new.

    A convolution that adds none does not show in weights, so that nothing can be said.
    """
    fits = row.start is not None and row.start(model, options)
    own = [name for name in model.state_dict() if row.adds(name)]
    model.loaded_weights.new += own
    if own:
        _logger.warning(
            f"{variant}: the plain model's weights are loaded, {len(own)} tensors of the {row.noun} are new, and "
            f'BatchNorm statistics {"nearly fit" if fits else "do not fit"}: use {row.refit}, or train.')


def _load_added(model: TimmModel, added: Dict[str, torch.Tensor], row: Convolution, variant: str, whole: bool) -> None:
    """Load the tensors that the convolution adds.

    Args:
        model: Is converted and has the plain model's weights.
        added: Its weights, by flat names.
        row: The convolution.
        variant: The model's name.
        whole: The model has all layers that the weights are for, which ``features_only`` may cut.

    Raises:
        MisfitError: Some are missing, too many or of another shape.
    """
    own = {name: value for name, value in model.state_dict().items() if row.adds(name)}
    loaded: LoadedWeights = model.loaded_weights
    missing = [name for name in own if flat_name(name) not in added]
    if missing:
        raise MisfitError(
            f"{loaded.source}: the weights lack {len(missing)} keys of the {row.noun}, such as '{missing[0]}'.")
    others = added.keys() - {flat_name(name) for name in own} if whole else set()
    wrong = [name for name, value in own.items() if added[flat_name(name)].shape != value.shape]
    if others or wrong:
        raise MisfitError(
            f'{loaded.source}: the weights have {len(others) + len(wrong)} tensors of the {row.noun} for which '
            f"{variant} with these options has no place, such as '{min([*others, *wrong])}'; give it the {row.prefix}_ "
            'options of the weights.')
    model.load_state_dict({name: added[flat_name(name)] for name in own}, strict=False)
    loaded.loaded += len(own)


def register_convolution_variant(backbone: str, convolution: str) -> str:
    """Register `<prefix><backbone>` with timm.

    The model takes the backbone's arguments and the options of :func:`timm_spinal.convert`, prefixed ``<prefix>_``.

    Args:
        backbone: A timm model name without tag.
        convolution: A row of ``timm_spinal.CONVOLUTIONS``, which is its prefix too.

    Returns:
        The registered name. Registering it again changes nothing.

    Raises:
        ValueError: If the backbone or the convolution is unknown, or the name belongs to another model.
    """
    row = CONVOLUTIONS[convolution]
    name = f'{row.prefix}{backbone}'
    create = partial(create_converted, backbone, convolution)
    doc = f'{backbone} with {row.title} convolutions.'
    paper = dict(paper_ids=f'arXiv:{row.paper}') if row.paper else {}
    return register_variant(__name__, name, backbone, create, doc, instead='convert', architecture=name, **paper)


def register_ic_variant(backbone: str) -> str:
    """:func:`register_convolution_variant` of inter-layer collision: `ic<backbone>`."""
    return register_convolution_variant(backbone, 'ic')


for _row in CONVOLUTIONS.values():
    for _backbone in _row.backbones:
        register_convolution_variant(_backbone, _row.prefix)
register_head_variant('icresnet50', 'pspinal')
