"""The data set ``multimnist``: pairs of MNIST digits that overlap, 36 x 36 pixels, grey, two of 10 classes each.

Sabour et al., https://arxiv.org/abs/1710.09829, as spec capsule_xnor_heads 6 recommends it: two digits of different
classes, each shifted by 0 .. 8 pixels along either axis, added and clipped at 255. Each split makes its pairs of digits
of its own, so that no two splits share a digit image; in the script of XnODR they do, and nothing is clipped.
"""
import gzip
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from timm_spinal.errors import UserError

from .config import TrainConfig, ValidateConfig
from .dataset import Source
from .sampling import stratified_split
from .torch_sources import EVAL_NAMES, TRAIN_NAMES

CANVAS, SIDE, CLASSES = 36, 28, 10
_VALIDATION = 0.1
_FOLDERS = ('', 'MNIST/raw', 'raw', 'mnist')  # torchvision's is the second
# split: file part of MNIST, and which piece of it
_SPLITS = {'train': ('train', 0), 'validation': ('train', 1), 'test': ('t10k', None)}


class MultiMnist:
    """``pairs[i]``: a PIL image of mode L, 36 x 36, and the memberships of its classes, (10,) float32 with two ones.

    A pair depends on seed, index and digits only, whatever the size. As in Sabour et al. every digit is the first of a
    pair in turn; the second is drawn from the digits of the other classes.

    Args:
        images: Digits (N, 28, 28), uint8.
        labels: Their classes (N,), 0 .. 9, at least two different ones.
        size: Number of pairs, any.
        seed: Random seed.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int, seed: int):
        self.images, self.labels = images, labels
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def pair(self, index: int) -> tuple[tuple[int, int], np.ndarray]:
        """Indices of the two digits, and their shifts ((y, x), (y, x)) in pixels."""
        if not 0 <= index < self.size:
            raise IndexError(f'pair {index} of {self.size}')
        rng = np.random.default_rng([self.seed, index])
        first = second = index % len(self.labels)
        while self.labels[second] == self.labels[first]:
            second = int(rng.integers(len(self.labels)))
        return (first, second), rng.integers(0, CANVAS - SIDE, (2, 2), endpoint=True)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        digits, shifts = self.pair(index)
        canvas = np.zeros((CANVAS, CANVAS), np.uint16)
        for digit, (y, x) in zip(digits, shifts):
            canvas[y:y + SIDE, x:x + SIDE] += self.images[digit]
        target = np.zeros(CLASSES, np.float32)
        target[self.labels[list(digits)]] = 1.
        return Image.fromarray(canvas.clip(max=255).astype(np.uint8)), target


def open_multimnist(config: TrainConfig | ValidateConfig, split: str, training: bool = False) -> Source:
    """Pairs of one split: 'train' of nine tenths of MNIST's training digits, 'validation' of the rest, 'test'.

    The digits of a split are the same in every run. The pairs for training follow the run's seed; those for evaluation
    are always the same.

    Args:
        config: Where MNIST is, and how many pairs (as many as there are digits when not given).
        split: Name of the split; 'train' and 'validation' may be called by their synonyms.
        training: Whether the pairs are trained on.

    Raises:
        UserError: An unknown split, or files that are missing or damaged.
    """
    name = 'train' if split in TRAIN_NAMES else 'validation' if split in EVAL_NAMES else split
    if name not in _SPLITS:
        raise UserError(f'dataset multimnist: no split {split!r}; it has train, validation and test')
    part, piece = _SPLITS[name]
    images, labels = read_mnist(config.data_dir, part)
    if piece is not None:
        chosen = stratified_split(labels, _VALIDATION, seed=0)[piece]
        images, labels = images[chosen], labels[chosen]
    if len(np.unique(labels)) < 2:
        raise UserError(f'dataset multimnist: the digits of split {name} are of one class, and pairs need two; check '
                        f'the files under {config.data_dir}')
    size = config.train_num_samples if training else config.val_num_samples
    pairs = MultiMnist(images, labels, size or len(labels), config.seed if training else 0)
    return Source(f'multimnist, split {name}', pairs, class_names=[str(i) for i in range(CLASSES)], multi_label=True)


def find_mnist(data_dir: str, part: str, kind: str) -> Path | None:
    """One of MNIST's files, packed or not, in a folder or where torchvision puts it there.

    Args:
        data_dir: The folder.
        part: 'train' or 't10k'.
        kind: 'images-idx3' or 'labels-idx1'.
    """
    names = [f'{part}-{k}-ubyte{packed}' for k in (kind, kind.replace('-', '.')) for packed in ('', '.gz')]
    paths = (Path(os.path.expanduser(data_dir)) / folder / name for folder in _FOLDERS for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_mnist(data_dir: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits (N, 28, 28), uint8, and classes (N,), int64, of MNIST's 'train' or 't10k' files.

    Raises:
        UserError: Files that are missing or damaged, or no digits of 28 pixels.
    """
    if not data_dir:
        raise UserError("dataset multimnist: no folder for MNIST's files; give one with --data-dir")
    paths = [find_mnist(data_dir, part, kind) for kind in ('images-idx3', 'labels-idx1')]
    if paths[0] is None or paths[1] is None:
        missing = f'{part}-{"images-idx3" if paths[0] is None else "labels-idx1"}-ubyte'
        raise UserError(f'dataset multimnist: no {missing} (or .gz) in {data_dir} or its MNIST/raw; check --data-dir '
                        f'or add --dataset-download')
    images, labels = _read_idx(paths[0]), _read_idx(paths[1]).astype(np.int64)
    if labels.ndim != 1 or images.shape != (len(labels), SIDE, SIDE) or labels.max(initial=0) >= CLASSES:
        raise UserError(f'dataset multimnist: {paths[0]} and {paths[1].name} are not {SIDE}-pixel digits with their '
                        f'classes (shapes {images.shape} and {labels.shape}); put MNIST there')
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a file of the idx format."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        if data[:3] != b'\0\0\x08':
            raise ValueError('no idx file of bytes')
        shape = np.frombuffer(data, '>u4', data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape.astype(np.int64))
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as e:
        raise UserError(f'dataset multimnist: {path} cannot be read ({" ".join(str(e).split())}); fetch it anew') from e
