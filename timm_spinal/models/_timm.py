"""Every name of timm that is not public, in one place: timm may change them without notice.

Other files of the package import them from here; tests/models/test_timm.py says which feature needs each of them.
"""
# ruff: noqa: F401

from typing import Any, Dict

from timm.models._builder import _resolve_pretrained_source as resolve_pretrained_source
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args
from timm.models._features import feature_take_indices
from timm.models._hub import _PREFERRED_FILES as PREFERRED_FILES
from timm.models._hub import HF_WEIGHTS_NAME, hf_split, load_model_config_from_path, save_config_for_hf
from timm.models._hub import _get_safe_alternatives as get_safe_alternatives
from timm.models._input import update_model_args


def get_own_args(model: Any) -> Dict[str, Any]:
    """The arguments that ``create_model`` was given for a model, as timm writes them to config.json."""
    return dict(getattr(model, '_model_args', {}))


def set_own_args(model: Any, args: Dict[str, Any]) -> None:
    """Replace what :func:`get_own_args` gives; ``update_model_args`` adds to it."""
    model._model_args = args
