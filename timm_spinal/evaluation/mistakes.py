"""What was taken for what: counts of a confusion matrix, precision and recall of each class, the worst images."""
from typing import Any, NamedTuple, Sequence

import numpy as np

MOST_IN_MATRIX = 100  # classes; of more, only what occurs is counted


class Pair(NamedTuple):
    """``images`` of the ``of`` images of class ``target`` were answered with ``prediction``."""
    target: int
    prediction: int
    images: int
    of: int


class Confusion:
    """How often images of each class were answered with each; memory for what occurs, not for all pairs.

    Args:
        prediction: Classes that were said, (N,).
        target: Classes that are right, (N,).
        num_classes: Of the model.
    """

    def __init__(self, prediction: np.ndarray, target: np.ndarray, num_classes: int):
        self.num_classes = num_classes
        keys, self.counts = np.unique(target.astype(np.int64) * num_classes + prediction, return_counts=True)
        self.targets, self.predictions = keys // num_classes, keys % num_classes
        self.support = np.bincount(target, minlength=num_classes)

    def matrix(self) -> np.ndarray:
        """(classes, classes): a row for each class, a column for each answer."""
        matrix = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        matrix[self.targets, self.predictions] = self.counts
        return matrix

    def pairs(self) -> list[Pair]:
        """Mistakes, the most frequent first; of equal counts those of the smaller class, which it says more of."""
        found = [Pair(int(t), int(p), int(c), int(self.support[t]))
                 for t, p, c in zip(self.targets, self.predictions, self.counts) if t != p]
        return sorted(found, key=lambda pair: (-pair.images, pair.of, pair.target, pair.prediction))

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """As a table: the whole matrix of up to `MOST_IN_MATRIX` classes, else a row for each pair that occurs."""
        if self.num_classes <= MOST_IN_MATRIX:
            return [{'class': name, **dict(zip(names, row.tolist()))} for name, row in zip(names, self.matrix())]
        return [{'class': names[t], 'prediction': names[p], 'images': int(c)}
                for t, p, c in zip(self.targets, self.predictions, self.counts)]


def per_class(prediction: np.ndarray, target: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """``class``, ``precision``, ``recall``, ``f1`` and ``support`` of each class, by scikit-learn.

    A value is None where it is not defined: the precision of a class that is never said, the recall of one without
    images.
    """
    from sklearn.metrics import precision_recall_fscore_support
    columns = precision_recall_fscore_support(
        target, prediction, labels=np.arange(len(names)), zero_division=np.nan)  # type: ignore[arg-type]
    return [{'class': name, **{key: None if np.isnan(value) else float(value) for key, value in zip(
        ('precision', 'recall', 'f1'), values)}, 'support': int(support)}
        for name, *values, support in zip(names, *columns)]


def worst(loss: np.ndarray, most: int) -> np.ndarray:
    """Numbers of the images of greatest loss, the greatest first; NaN counts as infinite."""
    return np.argsort(-np.nan_to_num(loss, nan=np.inf, posinf=np.inf), kind='stable')[:most]
