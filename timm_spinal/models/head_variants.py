"""Registered models `<timm backbone>_<head>`: rows of one table over :func:`attach_head`.

``pretrained=True`` loads timm's weights of the backbone (tags ``backbone_<timm tag>``) and says that the head is new.
Weights of a whole model, as `timm.models.save_for_hf` writes them, load with their head.
A vision transformer made with ``num_classes=0`` and no weights of a head answers with the backbone's embedding.
"""

import difflib
import logging
from collections import deque
from dataclasses import replace
from typing import Any, Dict, Tuple

import timm
import torch
from timm.models import (
    filter_pretrained_cfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg_value,
    is_model,
    load_pretrained,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from timm.models._pretrained import DefaultCfg
from torch import nn

from ..layers import HEADS, head_options
from ..layers.packed_routing import check_packed_state
from ._packaged import packaged_cfgs
from .attach_head import CLASSIFIER_NAME, HEAD_NAME, TimmModel, attach_head

_logger = logging.getLogger(__name__)

BACKBONES = (
    'resnet18', 'resnet34', 'resnet50', 'resnet101',
    'wide_resnet50_2', 'wide_resnet101_2', 'resnext50_32x4d',
    'vgg11_bn', 'vgg13_bn', 'vgg16_bn', 'vgg19_bn',
    'densenet121',
    'mobilenetv2_100', 'mobilenetv3_large_100', 'efficientnet_b0', 'tf_efficientnet_lite0',
    'convnext_tiny', 'regnety_016',
    'vit_small_patch16_224', 'vit_large_patch16_224', 'swin_tiny_patch4_window7_224',
)
VARIANT_HEADS = ('spinal', 'pspinal')
CAPSULE_BACKBONES = (
    'mobilenetv2_100', 'resnet50', 'efficientnet_b0', 'mobilenetv3_large_100', 'resnet18', 'convnext_tiny',
)
CAPSULE_HEADS = ('caps', 'xnodr', 'xnidr')
VARIANTS = (
    *((backbone, head) for backbone in BACKBONES for head in VARIANT_HEADS),
    *((backbone, head) for backbone in CAPSULE_BACKBONES for head in CAPSULE_HEADS),
)

default_cfgs: Dict[str, DefaultCfg] = {}


def _variant_cfgs(backbone: str, head: str) -> DefaultCfg:
    """timm's cfgs of a backbone under tags that say that the head is not in them; and packaged weights, with head."""
    cfgs = {}
    for name, cfg in get_arch_pretrained_cfgs(backbone).items():
        tag = split_model_name_tag(name)[1]
        backbone_tag = f'backbone_{tag}' if tag else 'backbone' if cfg.has_weights else ''
        cfgs[backbone_tag] = replace(cfg, classifier=CLASSIFIER_NAME)
    whole = packaged_cfgs(f'{backbone}_{head}', next(iter(cfgs.values())))
    has_weights = any(cfg.has_weights for cfg in cfgs.values())
    cfgs = {**cfgs, **whole} if has_weights else whole or cfgs
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=has_weights or bool(whole))


def _read_state_dict(cfg: Dict[str, Any], cache_dir: Any) -> Dict[str, torch.Tensor]:
    """The weights that timm finds for a cfg, unchanged, wherever they lie."""
    state_dict: Dict[str, torch.Tensor] = {}

    def keep(loaded: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        state_dict.update(loaded)
        return {}

    source_only = dict(cfg, first_conv=None, classifier=None)
    load_pretrained(nn.Identity(), source_only, filter_fn=keep, cache_dir=cache_dir)
    return state_dict


def _load_head(model: TimmModel, state_dict: Dict[str, torch.Tensor], num_classes: int) -> None:
    """Load a whole model's head; for other classes than the weights' all but what is made for the classes."""
    prefix = f'{HEAD_NAME}.'
    missing = {name for name in model.state_dict() if not name.startswith(prefix)} - set(state_dict)
    if missing:
        raise RuntimeError(f"The weights lack {len(missing)} keys of the backbone, such as '{min(missing)}'.")
    head = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    same_classes = model.num_classes == num_classes
    if not same_classes and getattr(model.attached_head, 'packed', False):
        check_packed_state(head, 'fc.', packed=True, num_classes=model.num_classes)
    if not same_classes:
        new = tuple(f'{part}.' for part in model.attached_head.class_parts)
        head = {name: value for name, value in head.items() if not name.startswith(new)}
        _logger.info(f'The classifier is new: the model has {model.num_classes} classes, the weights {num_classes}.')
    model.attached_head.load_state_dict(head, strict=same_classes)


def _create_head_variant(
        backbone: str,
        head: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> nn.Module:
    variant = f'{backbone}_{head}'
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    cfg.update(architecture=variant, classifier=CLASSIFIER_NAME)
    known = {f'head_{option}' for option in head_options(head)}
    head_kwargs = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
    default_classes = cfg['num_classes'] if cfg['num_classes'] >= 0 else 1000
    num_classes = kwargs.pop('num_classes', default_classes)

    # timm builds the backbone and loads it through the family's own filters
    backbone_cfg = dict(cfg, architecture=backbone, classifier=get_pretrained_cfg_value(backbone, 'classifier'))
    state_dict: Dict[str, torch.Tensor] = {}
    if pretrained and not cfg.get('custom_load'):
        state_dict = _read_state_dict(cfg, cache_dir)
        backbone_cfg = filter_pretrained_cfg(backbone_cfg, remove_source=True)
        backbone_cfg['state_dict'] = {k: v for k, v in state_dict.items() if not k.startswith(f'{HEAD_NAME}.')}
    model = model_entrypoint(backbone)(
        pretrained=pretrained,
        pretrained_cfg=backbone_cfg,
        cache_dir=cache_dir,
        num_classes=0,
        **kwargs,
    )
    cfg.pop('state_dict', None)
    if not kwargs.get('features_only'):
        attach_head(model, head, num_classes, **head_kwargs)
        if any(name.startswith(f'{HEAD_NAME}.') for name in state_dict):
            _load_head(model, state_dict, default_classes)
        elif not num_classes and not model.unpooled and hasattr(model, 'num_prefix_tokens'):
            # a token model of timm's that is made without classes answers with num_features, its embedding
            model.attached_head.postpone_hidden()
            model.head_hidden_size = model.attached_head.hidden_size
        elif pretrained:
            _logger.warning(f'{variant}: the backbone is pretrained, its {head} head is new and needs training.')
        model.pretrained_cfg = model.default_cfg = cfg
    return model


def register_head_variant(backbone: str, head: str) -> str:
    """Make `<backbone>_<head>` a name that ``timm.create_model`` knows.

    The model takes the backbone's arguments and the head's, the latter prefixed ``head_``.

    Args:
        backbone: A timm model name without tag.
        head: 'spinal', 'pspinal', 'caps', 'xnodr', 'xnidr', 'mlp' or 'linear'.

    Returns:
        The registered name. Registering it again changes nothing.

    Raises:
        ValueError: If the backbone or the head is unknown, or the name belongs to another model.
    """
    head_options(head)
    name = f'{backbone}_{head}'
    if name in default_cfgs:
        return name
    if not is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ''
        raise ValueError(f"Unknown timm model '{backbone}'; give a name of timm.list_models().{hint}")
    if is_model(name):
        raise ValueError(f"The name '{name}' belongs to another model; use attach_head on '{backbone}' instead.")

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_head_variant(backbone, head, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"timm's {backbone} with a {head} head in place of its classifier."
    default_cfgs[name] = _variant_cfgs(backbone, head)
    globals()[name] = register_model(entrypoint)
    return name


def ensure_registered(model_name: str) -> bool:
    """Register a `<timm backbone>_<head>` that is not yet registered; True if timm knows the name afterwards.

    Args:
        model_name: A model name, with or without a tag.
    """
    name = split_model_name_tag(model_name)[0]
    if is_model(name):
        return True
    backbone, _, head = name.rpartition('_')
    if head in HEADS and is_model(backbone):
        register_head_variant(backbone, head)
    return is_model(name)


def _register_table() -> Tuple[str, ...]:
    return tuple(register_head_variant(backbone, head) for backbone, head in VARIANTS)


_register_table()
