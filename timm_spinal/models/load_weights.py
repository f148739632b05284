"""Weights from a file: a new model with those that fit, or all of them into a model that exists."""

import os
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, Optional

import timm
from timm.models import (
    ResNet,
    build_model_with_cfg,
    get_pretrained_cfg_value,
    load_checkpoint,
    model_entrypoint,
    resolve_model_input_args,
    resolve_pretrained_cfg,
    split_model_name_tag,
)

from ._packaged import packaged_names
from ._timm import pretrained_cfg_for_features
from .fill_weights import (
    COUNTER,
    LoadedWeights,
    State,
    does_not_fit,
    plain_resnet_names,
    same_shape,
    watch_load,
)
from .weight_files import WeightsError, read_weights, unwrap

Filter = Callable[[State, Any], State]

SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')


def create_from_file(name: str, path: str, **kwargs: Any) -> Any:
    """``timm.create_model`` with the weights of a file: the backbone and, where it fits, the classifier.

    The model's ``loaded_weights``, a `LoadedWeights`, report what was loaded.

    Args:
        name: Any name that timm takes; of a saved model its architecture and arguments.
        path: The file, see :func:`timm_spinal.models.weight_files.read_weights`.
        **kwargs: Arguments of ``timm.create_model``.

    Raises:
        WeightsError: A file that cannot be read or fills less than the backbone.
    """
    resolved = resolve_model_input_args(name, **kwargs)
    arch = resolved.pop('model_name')
    cfg = {key: value for key, value in resolved.pop('pretrained_cfg').items() if key not in SOURCE_KEYS}
    cfg.update(file=str(path), custom_load=False)

    create = partial(timm.create_model, arch, pretrained=True, **resolved)
    if model_entrypoint(arch).__module__.startswith(f'{__package__.partition(".")[0]}.'):
        return create(pretrained_cfg=cfg)  # our models read files by themselves
    return create_filled(create, cfg, resolved)


def build_model(
        model_cls: Callable[..., Any],
        variant: str,
        pretrained: bool,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        pretrained_filter_fn: Optional[Filter] = None,
        **kwargs: Any,
) -> Any:
    """timm's ``build_model_with_cfg``, with files of weights read and loaded by the rules of this package.

    ``pretrained=True`` for a name whose default cfg has no weights loads those of the package, which were trained with
    another preprocessing. The model renames the weights of foreign code in ``load_state_dict`` too, so that
    ``checkpoint_path`` takes them.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    if pretrained and not _has_weights(cfg):
        cfg = _packaged(variant) or cfg
    cfg['classifier'] = cfg.get('classifier') or get_pretrained_cfg_value(variant, 'classifier')

    create = partial(
        build_model_with_cfg, model_cls, variant, pretrained, pretrained_filter_fn=pretrained_filter_fn, **kwargs)
    from_file = pretrained and is_from_file(cfg)
    model = create_filled(create, cfg, kwargs) if from_file else create(pretrained_cfg=cfg)
    if not kwargs.get('features_only'):
        model.rename_fn = pretrained_filter_fn
        model.register_load_state_dict_pre_hook(rename_weights)
    return model


def _has_weights(cfg: Dict[str, Any]) -> bool:
    return any(cfg.get(key) for key in ('url', 'file', 'hf_hub_id', 'source', 'state_dict'))


def _packaged(variant: str) -> Dict[str, Any]:
    """The cfg of the first of an architecture's packaged weights; empty without any."""
    name = next((name for name in packaged_names() if split_model_name_tag(name)[0] == variant), None)
    return resolve_pretrained_cfg(name).to_dict() if name else {}


def is_from_file(cfg: Dict[str, Any]) -> bool:
    """Whether a pretrained cfg names a file of weights, which is not in the folder of a saved model."""
    return bool(cfg.get('file')) and not cfg.get('source') and not cfg.get('custom_load')


def create_filled(
        create: Callable[..., Any],
        cfg: Dict[str, Any],
        kwargs: Dict[str, Any],
        state_dict: Optional[State] = None,
) -> Any:
    """Let timm make a model and fill it from a file by our rules.

    Args:
        create: Makes the model with the ``pretrained_cfg`` that it is given, under which timm leaves the classifier
            alone.
        cfg: The model's own pretrained cfg, with ``file``; the model keeps it.
        kwargs: The model's arguments, the same that ``create`` passes on.
        state_dict: The weights, all of the file if None.

    Raises:
        WeightsError: A file that cannot be read or fills less than the backbone.
    """
    if state_dict is None:
        state_dict = cfg.get('state_dict') or read_weights(cfg['file'])
    if not state_dict:
        raise WeightsError(f'{cfg["file"]}: contains only a head, and no weights of the backbone')
    load_cfg = dict(cfg, state_dict=dict(state_dict), classifier=None)
    with watch_load(str(cfg['file']), cfg.get('classifier'), True, bool(kwargs.get('features_only'))) as loaded:
        try:
            model = create(pretrained_cfg=load_cfg)
        except RuntimeError as e:
            stem = state_dict.get(f'{cfg.get("first_conv")}.weight')
            if 'is inconsistent with input_size' not in str(e) or stem is None:
                raise
            # the weights have other input channels than the cfg says, and timm trusts the cfg
            in_chans = kwargs.get('in_chans', cfg['input_size'][0])
            load_cfg = dict(load_cfg, input_size=(stem.shape[1], *cfg['input_size'][1:]))
            model = create(pretrained_cfg=load_cfg, in_chans=in_chans)
    cfg = {key: value for key, value in cfg.items() if key != 'state_dict'}
    model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(cfg) if kwargs.get('features_only') else cfg
    model.loaded_weights = loaded
    return model


# ---- all weights of a file, into a model that exists -----------------------------------------------------------


def load_exactly(model: Any, path: str, use_ema: Optional[bool] = None) -> LoadedWeights:
    """Load a file whose weights are those of the model, all of them.

    Args:
        model: Filled in place. Its own filter renames weights of foreign code.
        path: The file.
        use_ema: As in :func:`timm_spinal.models.weight_files.read_weights`.

    Raises:
        WeightsError: A file that cannot be read, or any weight that is missing, too many or of another shape.
    """
    if os.path.splitext(path)[1] in ('.npz', '.npy'):  # of JAX, for the models of timm that convert it
        try:
            load_checkpoint(model, path)
        except Exception as e:  # the model's own converter raises any error at other arrays
            raise WeightsError(f'{path}: {" ".join(str(e).split()) or "no such file"}') from e
        return LoadedWeights(path, len(model.state_dict()))
    state_dict: Any = OrderedDict(read_weights(path, use_ema))
    if isinstance(model, ResNet):
        state_dict = OrderedDict(plain_resnet_names(state_dict))
    try:
        if hasattr(model, 'rename_fn'):
            rename_weights(model, state_dict, '')
        own = model.state_dict()
        left_out = [name for name, value in state_dict.items() if name not in own and value.numel() == 1]
        for name in left_out:
            del state_dict[name]
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        lacking = [name for name, value in own.items() if not name.endswith(COUNTER)
                   and (name not in state_dict or not same_shape(value, state_dict[name]))]
        extra = [name for name in state_dict if name not in own]
        total = sum(not name.endswith(COUNTER) for name in own)
        raise does_not_fit(path, model, state_dict, lacking, extra, total, 'model') from e
    except ValueError as e:  # a packed head
        raise WeightsError(f'{path}: {e}') from e
    return LoadedWeights(path, len(own), left_out)


def rename_weights(model: Any, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook of ``load_state_dict`` of a whole model: open containers and rename the weights of foreign code, in place.

    The model's ``rename_fn`` is the filter of its family, None for none.
    """
    own = model.state_dict().keys()
    if prefix or state_dict.keys() <= own:  # a part of a larger module, or names that are right already
        return
    renamed = unwrap(state_dict) or {}
    if isinstance(model, ResNet):
        renamed = plain_resnet_names(renamed)
    if model.rename_fn is not None:
        renamed = model.rename_fn(renamed, model)
    if len(own & renamed.keys()) > len(own & state_dict.keys()):
        state_dict.clear()
        state_dict.update(renamed)
