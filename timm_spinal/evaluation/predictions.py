"""What a model answers to each image of a split, kept for accuracies of classes and calibration."""
from pathlib import Path

import torch
from safetensors.torch import save_file

from timm_spinal.files import write_atomically

PREDICTIONS = 'predictions.safetensors'


class Predictions:
    """Collects batches of an evaluation: ``prediction`` and ``target`` (N,), and ``confidence`` (N,) of the first."""

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take the logits (B, C) and classes (B,) of a batch."""
        confidence, prediction = output.float().softmax(dim=1).max(dim=1)
        self._batches.append((prediction.cpu(), target.cpu(), confidence.cpu()))

    def write(self, folder: Path) -> None:
        """Write ``predictions.safetensors``.

        Raises:
            UserError: It cannot be written.
        """
        columns = dict(zip(('prediction', 'target', 'confidence'), map(torch.cat, zip(*self._batches))))
        write_atomically(folder / PREDICTIONS, lambda path: save_file(columns, path))
