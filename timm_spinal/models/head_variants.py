"""Registered models `<timm backbone>_<head>`: rows of one table over :func:`attach_head`.

``pretrained=True`` loads timm's weights of the backbone (tags ``backbone_<timm tag>``) and says that the head is new.
Weights of a whole model, as `timm.models.save_for_hf` writes them, load with their head.
A vision transformer made with ``num_classes=0`` and no weights of a head answers with the backbone's embedding.
"""

import logging
from functools import partial
from typing import Any, Dict, Tuple

import torch
from timm.models import resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg
from torch import nn

from ..layers import head_options, head_takes_map
from ..layers.packed_routing import check_packed_state
from ._variants import create_backbone, register_variant
from .attach_head import CLASSIFIER_NAME, HEAD_NAME, TimmModel, attach_head
from .fill_weights import LoadedWeights
from .load_weights import is_from_file

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


def _load_head(model: TimmModel, state_dict: Dict[str, torch.Tensor], num_classes: int, from_file: bool) -> bool:
    """Load a whole model's head; for other classes than the weights' all but what is made for the classes.

    Args:
        model: Its head is attached and new.
        state_dict: The weights of the whole model.
        num_classes: The number of classes that they are said to have.
        from_file: They are from a file, which says nothing of its classes and may have another head: what does not fit
            stays new.

    Returns:
        Whether anything of it was loaded.
    """
    prefix = f'{HEAD_NAME}.'
    missing = {name for name in model.state_dict() if not name.startswith(prefix)} - set(state_dict)
    if missing and not from_file:
        raise RuntimeError(f"The weights lack {len(missing)} keys of the backbone, such as '{min(missing)}'.")
    own = model.attached_head.state_dict()
    head = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    of_classes = tuple(f'{part}.' for part in model.attached_head.class_parts)
    misfits = {name for name in own.keys() | head.keys()
               if name not in own or name not in head or own[name].shape != head[name].shape}
    same_classes = not misfits if from_file else model.num_classes == num_classes
    if model.num_classes and not same_classes and getattr(model.attached_head, 'packed', False):
        check_packed_state(head, 'fc.', packed=True, num_classes=model.num_classes)
    kept = head
    if not same_classes:
        another = from_file and any(not name.startswith(of_classes) for name in misfits)
        kept = {} if another else {name: value for name, value in head.items() if not name.startswith(of_classes)}
        if kept:
            _logger.info(f'The classifier is new: the model has {model.num_classes} classes, the weights others.')
    model.attached_head.load_state_dict(kept, strict=same_classes)
    _note(model, head, kept)
    return bool(kept)


def _note(model: TimmModel, head: Dict[str, torch.Tensor], kept: Dict[str, torch.Tensor]) -> None:
    """Add what became of a head to what became of the backbone."""
    found: LoadedWeights = model.loaded_weights
    found.loaded += len(kept)
    if 'fc.weight' not in kept and (fc := head.get('fc.weight')) is not None and fc.ndim == 2:
        found.classes = len(fc)
    found.left_out += [f'{HEAD_NAME}.{name}' for name in head if name not in kept]
    found.new += [f'{HEAD_NAME}.{name}' for name in model.attached_head.state_dict() if name not in kept]
    own = model.state_dict()  # without what the head goes past
    found.new[:] = [name for name in found.new if name in own]


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
    saved = kwargs.get('pretrained_model_args') or {}
    if default_classes and saved.get('global_pool') == '' and _takes_map(head, head_kwargs):
        kwargs.pop('global_pool')  # timm saves the backbone's pooling, which a head that reads the map has turned off

    model, state_dict = create_backbone(
        backbone,
        cfg,
        is_ours=lambda name: name.startswith(f'{HEAD_NAME}.'),
        pretrained=pretrained,
        cache_dir=cache_dir,
        num_classes=0,
        **kwargs,
    )
    cfg.pop('state_dict', None)
    if not kwargs.get('features_only'):
        attach_head(model, head, num_classes, **head_kwargs)
        kept = False
        if any(name.startswith(f'{HEAD_NAME}.') for name in state_dict):
            kept = _load_head(model, state_dict, default_classes, is_from_file(cfg))
        elif not num_classes and not model.unpooled and hasattr(model, 'num_prefix_tokens'):
            # a token model of timm's that is made without classes answers with num_features, its embedding
            model.attached_head.postpone_hidden()
            model.head_hidden_size = model.attached_head.hidden_size
        elif pretrained:
            _note(model, {}, {})
        if pretrained and not kept and model.attached_head.state_dict():
            _logger.warning(f'{variant}: the backbone is pretrained, its {head} head is new and needs training.')
        model.pretrained_cfg = model.default_cfg = cfg
    return model


def _takes_map(head: str, head_kwargs: Dict[str, Any]) -> bool:
    return head_takes_map(head, **{name[len('head_'):]: value for name, value in head_kwargs.items()})


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
    create = partial(_create_head_variant, backbone, head)
    doc = f"timm's {backbone} with a {head} head in place of its classifier."
    return register_variant(
        __name__, f'{backbone}_{head}', backbone, create, doc, instead='attach_head', classifier=CLASSIFIER_NAME)


def _register_table() -> Tuple[str, ...]:
    return tuple(register_head_variant(backbone, head) for backbone, head in VARIANTS)


_register_table()
