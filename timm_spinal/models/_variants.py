"""What `head_variants.py` and `convolution_variants.py` share: registration, and weights of the plain timm model."""

import sys
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, Tuple

import timm
import torch
from timm.models import (
    DefaultCfg,
    filter_pretrained_cfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg_value,
    is_model,
    load_pretrained,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from torch import nn

from ..layers import nearest
from ._packaged import packaged_cfgs, same_preprocessing
from ._timm import pretrained_cfg_for_features
from .fill_weights import watch_load
from .head_only import fetch_backbone
from .load_weights import create_filled, is_from_file, rename_weights
from .weight_files import read_weights

TAG_PREFIX = 'backbone'


def variant_cfgs(name: str, backbone: str, **changes: Any) -> DefaultCfg:
    """Pretrained cfgs of a model that is made of a plain one.

    They are the plain model's, with changes, under tags ``backbone_<tag>``, and those of packaged weights of the whole
    model. The latter are the default where their preprocessing is the plain model's.
    """
    cfgs = {}
    for plain_name, cfg in get_arch_pretrained_cfgs(backbone).items():
        tag = split_model_name_tag(plain_name)[1]
        if tag and not tag.startswith(TAG_PREFIX):
            tag = f'{TAG_PREFIX}_{tag}'
        cfgs[tag or (TAG_PREFIX if cfg.has_weights else '')] = replace(cfg, **changes)
    base = next(iter(cfgs.values()))
    whole = packaged_cfgs(name, base)
    has_weights = any(cfg.has_weights for cfg in cfgs.values())
    if not has_weights:
        cfgs = whole or cfgs
    elif any(same_preprocessing(cfg, base) for cfg in whole.values()):
        cfgs = {**whole, **cfgs}
    else:
        cfgs = {**cfgs, **whole}
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=has_weights or bool(whole))


def read_state_dict(cfg: Dict[str, Any], cache_dir: Any) -> Dict[str, torch.Tensor]:
    """The weights that a cfg names, as they are in the file, wherever timm loads them from."""
    state_dict: Dict[str, torch.Tensor] = {}

    def keep(loaded: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        state_dict.update(loaded)
        return {}

    source_only = dict(cfg, first_conv=None, classifier=None)
    load_pretrained(nn.Identity(), source_only, filter_fn=keep, cache_dir=cache_dir)
    return state_dict


def create_backbone(
        backbone: str,
        cfg: Dict[str, Any],
        is_ours: Callable[[str], bool],
        pretrained: bool = False,
        cache_dir: Any = None,
        **kwargs: Any,
) -> Tuple[Any, Dict[str, torch.Tensor]]:
    """The plain model, made by timm with its part of the weights, and all weights that the cfg names.

    Its ``loaded_weights`` tell what became of its part; the caller adds the rest.

    Args:
        backbone: Its registered name.
        cfg: Pretrained cfg of our model.
        is_ours: Which names of parameters the plain model does not have.
        pretrained: Load the weights; none are read otherwise.
        cache_dir: As in ``timm.create_model``.
        **kwargs: The plain model's arguments.

    Returns:
        The model, and the weights, empty where none are read.
    """
    plain_cfg = dict(cfg, architecture=backbone, classifier=get_pretrained_cfg_value(backbone, 'classifier'))
    create = partial(model_entrypoint(backbone), pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    state_dict: Dict[str, torch.Tensor] = {}
    if pretrained:
        model, state_dict = _load_backbone(create, backbone, plain_cfg, is_ours)
    else:
        plain_cfg.pop('state_dict', None)  # not to be kept with the model
        model = create(pretrained_cfg=plain_cfg)
        model.loaded_weights = None
    if not (kwargs.get('features_only') or hasattr(model, 'rename_fn')):
        model.rename_fn = None
        model.register_load_state_dict_pre_hook(rename_weights)
    return model, state_dict


def _load_backbone(
        create: 'partial[Any]',
        backbone: str,
        cfg: Dict[str, Any],
        is_ours: Callable[[str], bool],
) -> Tuple[Any, Dict[str, torch.Tensor]]:
    """:func:`create_backbone` with weights; ``cfg`` is the plain model's, with the source of our model's weights."""
    state_dict: Dict[str, torch.Tensor] = {}
    load_cfg = cfg
    if not cfg.get('custom_load'):
        given = cfg.get('state_dict') or is_from_file(cfg) and read_weights(cfg['file'])
        state_dict = given or read_state_dict(cfg, create.keywords['cache_dir'])
        if state_dict and all(map(is_ours, state_dict)):
            state_dict = {**fetch_backbone(cfg, create.keywords['cache_dir']), **state_dict}
        load_cfg = filter_pretrained_cfg(cfg, remove_source=True)
        load_cfg['state_dict'] = {name: value for name, value in state_dict.items() if not is_ours(name)}
    if is_from_file(cfg):
        return create_filled(create, cfg, create.keywords, load_cfg['state_dict']), state_dict
    with watch_load(backbone) as loaded:
        model = create(pretrained_cfg=load_cfg)
    model.loaded_weights = loaded
    cfg.pop('state_dict', None)  # not to be kept with the model
    features_only = create.keywords.get('features_only')
    model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(cfg) if features_only else cfg
    return model, state_dict


def register_variant(
        module: str,
        name: str,
        backbone: str,
        create: 'partial[Any]',
        doc: str,
        instead: str,
        **cfg: Any,
) -> str:
    """Register the name of a model that is made of a plain one with timm.

    Args:
        module: Name of the module whose ``default_cfgs`` get its cfgs.
        name: The new name. Registering it again changes nothing.
        backbone: The plain model's name.
        create: Makes the model, as an entrypoint of timm's does.
        doc: Its docstring.
        instead: A function for the message where the name belongs to another model.
        **cfg: Changes of the plain model's pretrained cfgs.

    Raises:
        ValueError: If there is no such plain model, or the name belongs to another model.
    """
    home: Any = sys.modules[module]
    if name in home.default_cfgs:
        return name
    if not is_model(backbone):
        raise ValueError(f"Unknown timm model '{backbone}'; give a name of timm.list_models()."
                         f'{nearest(backbone, timm.list_models())}')
    if is_model(name):
        raise ValueError(f"The name '{name}' belongs to another model; use {instead} on '{backbone}' instead.")
    entrypoint: Any = create  # timm's registry knows it by what a function would have
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__, entrypoint.__doc__ = module, doc
    home.default_cfgs[name] = variant_cfgs(name, backbone, **cfg)
    setattr(home, name, register_model(entrypoint))
    return name
