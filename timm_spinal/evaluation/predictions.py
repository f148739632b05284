"""What a model answers to each image of a split, kept on the disk; accuracy of classes and calibration of it."""
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
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


def read_predictions(folder: Path) -> dict[str, np.ndarray] | None:
    """``prediction``, ``target`` and ``confidence`` (N,) of a run; None where it has kept none."""
    path = folder / PREDICTIONS
    return load_file(path) if path.exists() else None


def class_accuracy(prediction: np.ndarray, target: np.ndarray, label: int) -> float:
    """Part of the images of one class that are answered with it, in percent; NaN where there is no such image."""
    of_class = prediction[target == label]
    return 100. * float((of_class == label).mean()) if len(of_class) else float('nan')


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[np.ndarray, np.ndarray, float]:
    """Reliability of the top class in bins of equal width.

    Args:
        confidence: Probability of the predicted class, (N,), in [0, 1].
        correct: Whether it was right, (N,).
        bins: Number of bins.

    Returns:
        Mean confidence and accuracy of each bin, NaN where it is empty, and the expected calibration error (Guo et
        al., 2017), all as parts of one.
    """
    # a confidence between two bins belongs to the upper one, 1 to the last
    edges = np.linspace(0., 1., bins + 1, dtype=confidence.dtype)
    place = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid='ignore'):  # 0 / 0 of an empty bin is NaN
        sure = np.bincount(place, confidence, bins) / count
        right = np.bincount(place, correct.astype(float), bins) / count
    error = float(np.nansum(count * np.abs(right - sure)) / len(confidence))
    return sure, right, error
