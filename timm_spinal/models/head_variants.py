"""Registered models `<timm backbone>_<head>`, made by :func:`attach_head`.

``pretrained=True`` loads timm's weights of the backbone (tags ``backbone_<timm tag>``) and says that the head is new.
Weights of a whole model, as `timm.models.save_for_hf` writes them, load with their head. So does a head that was
published alone, with the weights of the backbone that it names.
A vision transformer made with ``num_classes=0`` and no weights of a head returns the backbone's embedding.
"""

import logging
from functools import partial
from typing import Any, Dict, Sequence

import torch
from timm.models import DefaultCfg, is_model_in_modules, resolve_pretrained_cfg
from torch import nn

from ..layers import head_needs_feature_map, head_options
from ..layers.packed_routing import check_packed_state
from ._feature_map import TimmModel
from ._hidden_layers import OPTION as RESET_OTHER
from ._hidden_layers import check_hidden_layers, replaces_hidden_layers
from ._variants import create_backbone, register_variant
from .attach_head import CLASSIFIER_NAME, HEAD_NAME, attach_head
from .fill_weights import LoadedWeights
from .head_only import is_in_head
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
    """Load the head of a whole model's weights; the modules per class stay new where the number of classes differs.

    Args:
        model: Its head is attached and new.
        state_dict: The weights of the whole model.
        num_classes: The number of classes that their config says.
        from_file: They are from a file, which has no config and may have another head: what does not fit stays new.

    Returns:
        Whether anything of the head was loaded.
    """
    head = {name[len(HEAD_NAME) + 1:]: value for name, value in state_dict.items() if is_in_head(name)}
    check_hidden_layers(model, state_dict, whole_model=bool(head))
    if not head:
        _note(model, head, head)
        return False
    missing = {name for name in model.state_dict() if not is_in_head(name)} - set(state_dict)
    if missing and not from_file:
        raise RuntimeError(f"The weights lack {len(missing)} keys of the backbone, such as '{min(missing)}'.")
    own = model.attached_head.state_dict()
    of_classes = tuple(f'{name}.' for name in model.attached_head.per_class_modules)
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
    """Add the head to the report of the backbone's weights.

    Args:
        model: The model, with the backbone's report.
        head: The head's weights, empty where the source has none.
        kept: Those of them that were loaded.
    """
    loaded: LoadedWeights = model.loaded_weights
    loaded.loaded += len(kept)
    if 'fc.weight' not in kept and (fc := head.get('fc.weight')) is not None and fc.ndim == 2:
        loaded.classes = len(fc)
    loaded.left_out += [f'{HEAD_NAME}.{name}' for name in head if name not in kept]
    loaded.new += [f'{HEAD_NAME}.{name}' for name in model.attached_head.state_dict() if name not in kept]
    own = model.state_dict()  # without the layers of the backbone that a head on its feature map does not use
    loaded.new[:] = [name for name in loaded.new if name in own]


def create_headed(
        backbone: str,
        head: str,
        options: Sequence[str],
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> nn.Module:
    """The entrypoint of `<backbone>_<head>`: timm's model without its classifier, and the head in its place.

    Args:
        backbone: A name of timm's.
        head: A row of ``HEADS``.
        options: Names of the head's options among the arguments.
        pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir: As timm passes them to every entrypoint.
        **kwargs: The backbone's arguments and the head's options.
    """
    variant = f'{backbone}_{head}'
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    cfg.update(architecture=variant, classifier=CLASSIFIER_NAME)
    head_kwargs: Dict[str, Any] = {}
    for name in options:
        if name in kwargs:
            head_kwargs[name] = kwargs.pop(name)
    default_classes = cfg['num_classes'] if cfg['num_classes'] >= 0 else 1000
    num_classes = kwargs.pop('num_classes', default_classes)
    saved = kwargs.get('pretrained_model_args') or {}
    if default_classes and saved.get('global_pool') == '' and head_needs_feature_map(
            head, head_kwargs.get('head_primary', '')):
        kwargs.pop('global_pool')  # timm saved '', the pooling of a backbone whose head reads the map

    if is_model_in_modules(backbone, ['vgg']) and replaces_hidden_layers(head, head_kwargs.get(RESET_OTHER)):
        kwargs['pretrained_strict'] = False  # the weights may lack what the head replaces
    model, state_dict = create_backbone(
        backbone, cfg, is_in_head, pretrained=pretrained, cache_dir=cache_dir, num_classes=0, **kwargs)
    if kwargs.get('features_only'):
        return model
    cfg.pop('state_dict', None)
    attach_head(model, head, num_classes, **head_kwargs)
    is_embedding = not num_classes and not model.unpooled and hasattr(model, 'num_prefix_tokens')
    if is_embedding and not any(map(is_in_head, state_dict)):
        # timm promises an embedding of num_features from a token model that is made without classes
        model.attached_head.postpone_hidden()
        model.head_hidden_size = model.attached_head.hidden_size
    loaded = pretrained and _load_head(model, state_dict, default_classes, is_from_file(cfg))
    if pretrained and not loaded and model.attached_head.state_dict():
        _logger.warning(f'{variant}: the backbone is pretrained, its {head} head is new and needs training.')
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def register_head_variant(backbone: str, head: str) -> str:
    """Register `<backbone>_<head>` with timm.

    The model takes the backbone's arguments and the head's, the latter prefixed ``head_``.

    Args:
        backbone: A timm model name without tag.
        head: A row of ``timm_spinal.HEADS``.

    Returns:
        The registered name. Registering it again changes nothing.

    Raises:
        ValueError: If the backbone or the head is unknown, or the name belongs to another model.
    """
    options = [*(f'head_{option}' for option in head_options(head)), RESET_OTHER]
    create = partial(create_headed, backbone, head, options)
    doc = f'{backbone} with the head {head} in place of its classifier.'
    return register_variant(
        __name__, f'{backbone}_{head}', backbone, create, doc, instead='attach_head', classifier=CLASSIFIER_NAME)


for _backbone, _head in VARIANTS:
    register_head_variant(_backbone, _head)
