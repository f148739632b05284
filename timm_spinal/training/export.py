"""Weights and config of a model as timm reads them back: ``timm.create_model('local-dir:RUN', pretrained=True)``."""
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file

from timm_spinal.models._timm import save_config_for_hf
from timm_spinal.models.attach_head import HEAD_NAME

from .files import write_atomically

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
# entries of pretrained_cfg that tell of the weights a model started from, or of the default ones of its name
_OF_OTHER_WEIGHTS = ('tag', 'origin_url', 'description', 'notes')


def export_model(
        folder: Path,
        model: nn.Module,
        state_dict: dict[str, torch.Tensor],
        class_names: list[str] | None,
        data_config: dict[str, Any],
) -> None:
    """Write ``model.safetensors`` and ``config.json``, each replaced in one step.

    Args:
        folder: Existing folder.
        model: Unwrapped timm model, for its name, options and input.
        state_dict: The weights; every key is written, also where tensors share memory.
        class_names: Written as ``label_names``.
        data_config: Input size, mean, std, interpolation and crop that the model was evaluated with.

    Raises:
        UserError: The disk is full; the files that were there are kept.
    """
    model_config = dict(label_names=class_names) if class_names else {}
    write_weights(folder, state_dict)

    def write_config(path: Path) -> None:
        save_config_for_hf(model, str(path), model_config=model_config, data_config=data_config)
        config = own_config(json.loads(path.read_text(encoding='utf-8')), model)
        path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    write_atomically(folder / CONFIG, write_config)


def own_config(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What timm writes to config.json, without what is not this model's own.

    That is what it says of other weights, the number of classes as an argument, which stands on top already and which
    transformers would pass on twice, and the pooling of a backbone in front of a head that averages the map itself.

    Args:
        config: Content of the config.json that timm saved; not changed.
        model: The model that was saved.
    """
    args = {k: v for k, v in config.get('model_args', {}).items() if k != 'num_classes'}
    head = getattr(model, HEAD_NAME, None)
    if head is not None and head.needs_feature_map and not model.unpooled and args.get('global_pool') == '':
        del args['global_pool']
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _OF_OTHER_WEIGHTS}
    return {**config, 'model_args': args, 'pretrained_cfg': cfg}


def write_weights(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Write ``model.safetensors``; every key is written, also where tensors share memory."""
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in state_dict.items()}
    # readers other than timm look for the format entry
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, metadata={'format': 'pt'}))
