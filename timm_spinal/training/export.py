"""Weights and config of a model as timm reads them back: ``timm.create_model('local-dir:RUN', pretrained=True)``."""
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from .files import write_atomically

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'


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
    write_atomically(folder / CONFIG, lambda p: save_config_for_hf(
        model, str(p), model_config=model_config, data_config=data_config))


def write_weights(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Write ``model.safetensors``; every key is written, also where tensors share memory."""
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in state_dict.items()}
    # readers other than timm look for the format entry
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, metadata={'format': 'pt'}))
