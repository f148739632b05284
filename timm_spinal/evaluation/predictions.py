"""What a model answers to each image of a split, kept on the disk; accuracy of classes and calibration of it."""
import json
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from timm_spinal.files import write_atomically

PREDICTIONS = 'predictions.safetensors'
UNKNOWN = -1  # place of an image whose place is not known


class Predictions:
    """Collects batches of an evaluation.

    Args:
        split: What the images are: ``test`` or ``validation``.
        file_of: Name of the image at a place of the split, if images have names.
    """

    def __init__(self, split: str = 'test', file_of: Callable[[int], str] | None = None):
        self.split = split
        self.file_of = file_of
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, output: torch.Tensor, target: torch.Tensor, places: torch.Tensor | None = None) -> None:
        """Take the logits (B, C), classes (B,) and places in the split (B,) of a batch; nothing waits for the device.
        """
        output = output.float()
        confidence, prediction = output.softmax(dim=1).max(dim=1)
        loss = F.cross_entropy(output, target, reduction='none')
        places = torch.full_like(target, UNKNOWN) if places is None else places
        self._batches.append((prediction, target, confidence, loss, places))

    def columns(self) -> dict[str, np.ndarray]:
        """``prediction``, ``target``, ``confidence`` of the first, ``loss`` in nats and ``place``, each (N,)."""
        names = ('prediction', 'target', 'confidence', 'loss', 'place')
        return {name: torch.cat([part.cpu() for part in parts]).numpy()
                for name, parts in zip(names, zip(*self._batches))}

    def files(self, places: np.ndarray) -> list[str]:
        """Names of the images at these places; '' of those that have none."""
        return ['' if self.file_of is None or place == UNKNOWN else self.file_of(int(place)) for place in places]

    def write(self, folder: Path) -> None:
        """Write ``predictions.safetensors``: the columns, and in its metadata the split and the names of the images.

        Raises:
            UserError: It cannot be written.
        """
        columns = self.columns()
        metadata = dict(split=self.split, files=json.dumps(self.files(columns['place'])))
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        write_atomically(folder / PREDICTIONS, lambda path: save_file(tensors, path, metadata))


def read_predictions(folder: Path, split: str = 'test') -> dict[str, np.ndarray] | None:
    """The columns of `Predictions` that a run has kept, and ``file`` (N,), names of the images.

    Args:
        folder: The run folder.
        split: ``test``, or ``validation``, which is kept by runs without a test split.

    Returns:
        None where it has kept none of this split.
    """
    path = folder / PREDICTIONS
    if not path.exists():
        return None
    with safe_open(path, 'numpy') as kept:
        metadata = kept.metadata() or {}
        if metadata.get('split', 'test') != split:
            return None
        names = kept.keys()  # it cannot be iterated itself
        columns = {name: kept.get_tensor(name) for name in names}
    files = json.loads(metadata.get('files', '[]')) or [''] * len(columns['target'])
    return dict(columns, file=np.asarray(files))


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
