"""A detector as files: ``model.safetensors`` and a ``config.json`` with the arguments of `create_detector`."""
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_spinal.errors import UserError
from timm_spinal.files import read_json, write_json
from timm_spinal.training.results import CONFIG, WEIGHTS, write_weights

from .detector import create_detector


def save_detector(
        folder: Path,
        detector: Any,
        state_dict: dict[str, torch.Tensor],
        class_names: list[str],
) -> None:
    """Write a detector into an existing folder, each file in one step.

    Args:
        folder: Where to.
        detector: Unwrapped, made by `create_detector`.
        state_dict: Its weights.
        class_names: Of label 1, 2, ...

    Raises:
        UserError: The disk is full; the files that were there are kept.
    """
    write_weights(folder, state_dict)
    write_json(folder / CONFIG, dict(detector=detector.options, class_names=class_names))


def load_detector(folder: str | Path) -> Any:
    """The detector that a run of ``timm-spinal train-detection`` left, in eval mode.

    Its attribute ``class_names`` has the name of label 1 at index 0.

    Raises:
        UserError: No such folder, none of a detector, or damaged weights.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or 'detector' not in config:
        what = f'has no {CONFIG}' if config is None else 'is not the run of a detector'
        raise UserError(f'detector {folder}: {what}; give a run folder of timm-spinal train-detection')
    detector = create_detector(**config['detector'])
    try:
        detector.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as e:
        raise UserError(f'detector {folder}: {WEIGHTS} does not fit or is damaged ({" ".join(str(e).split())})') from e
    detector.class_names = config['class_names']
    return detector.eval()
