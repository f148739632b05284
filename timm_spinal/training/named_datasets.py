"""Data sets that are known by name: torchvision's, ``digits`` and ``multimnist``.

Of torchvision's, timm's `create_dataset` knows some; a table has those that it does not know.
"""
import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets as tv
from PIL import Image
from timm.data import create_dataset

from timm_spinal.errors import UserError

from .config import TrainConfig, ValidateConfig
from .dataset import Split, stratified_split
from .pixels import open_image

# 'torch/' names that timm 1.0.31 makes itself, with the splits that they have
TIMM_NAMES: dict[str, tuple[str, ...]] = {
    'mnist': ('train', 'test'), 'fashion_mnist': ('train', 'test'), 'kmnist': ('train', 'test'),
    'qmnist': ('train', 'test'), 'cifar10': ('train', 'test'), 'cifar100': ('train', 'test'),
    'inaturalist': (), 'inat': (), 'places365': (), 'imagenet': ('train', 'val'), 'image_folder': (), 'folder': (),
}

TRAIN_NAMES = ('train', 'training')
EVAL_NAMES = ('val', 'valid', 'validation', 'eval', 'evaluation')


@dataclass(frozen=True)
class TorchSet:
    """A torchvision class and how it takes a split.

    Attributes:
        cls: Name in `torchvision.datasets`.
        splits: Its splits; none where it is one whole.
        argument: The constructor's argument for the split: 'split', or 'train' (a boolean).
        kwargs: Further arguments.
        label_offset: Smallest label, for sets that count from 1.
    """
    cls: str
    splits: tuple[str, ...] = ('train', 'test')
    argument: str = 'split'
    kwargs: tuple[tuple[str, Any], ...] = ()
    label_offset: int = 0


def _emnist(split: str, label_offset: int = 0) -> TorchSet:
    return TorchSet('EMNIST', argument='train', kwargs=(('split', split),), label_offset=label_offset)


TORCH_SETS: dict[str, TorchSet] = {
    'emnist_balanced': _emnist('balanced'),
    'emnist_byclass': _emnist('byclass'),
    'emnist_bymerge': _emnist('bymerge'),
    'emnist_digits': _emnist('digits'),
    'emnist_letters': _emnist('letters', label_offset=1),
    'emnist_mnist': _emnist('mnist'),
    'caltech101': TorchSet('Caltech101', splits=()),
    'caltech256': TorchSet('Caltech256', splits=()),
    'country211': TorchSet('Country211', splits=('train', 'valid', 'test')),
    'dtd': TorchSet('DTD', splits=('train', 'val', 'test')),
    'eurosat': TorchSet('EuroSAT', splits=()),
    'fgvc_aircraft': TorchSet('FGVCAircraft', splits=('train', 'val', 'trainval', 'test')),
    'flowers102': TorchSet('Flowers102', splits=('train', 'val', 'test')),
    'food101': TorchSet('Food101'),
    'gtsrb': TorchSet('GTSRB'),
    'oxford_iiit_pet': TorchSet('OxfordIIITPet', splits=('trainval', 'test')),
    'stanford_cars': TorchSet('StanfordCars'),
    'stl10': TorchSet('STL10'),
    'svhn': TorchSet('SVHN', splits=('train', 'test', 'extra')),
    'usps': TorchSet('USPS', argument='train'),
}

NAMES = sorted({*TIMM_NAMES, *TORCH_SETS})


def torch_split(name: str, split: str) -> str:
    """The data set's own name of a split that may be called by a synonym.

    'train' and 'validation' and their like find the nearest thing the set has ('trainval'; 'val', else 'test'); a set
    that is one whole has 'train' only.

    Raises:
        UserError: The set has no such split.
    """
    splits = TORCH_SETS[name].splits if name in TORCH_SETS else TIMM_NAMES[name]
    if split in splits or (not splits and name in TIMM_NAMES):
        return split
    wanted = TRAIN_NAMES + ('trainval',) if split in TRAIN_NAMES else EVAL_NAMES + ('test',)
    nearest = [s for s in wanted if s in splits] if split in TRAIN_NAMES + EVAL_NAMES else []
    if nearest:
        return nearest[0]
    if not splits and split in TRAIN_NAMES:
        return 'train'
    has = ', '.join(splits) if splits else "only one part, 'train'"
    raise UserError(f'dataset torch/{name}: no split {split!r} (it has {has}); '
                    f'name one of them or cut one from train with --val-split-fraction 0.1')


def open_torch(name: str, split: str, root: str, download: bool) -> tuple[Any, int]:
    """A torchvision data set without transforms, and its smallest label.

    Args:
        name: A key of `TIMM_NAMES` or `TORCH_SETS`.
        split: A split's own name, from `torch_split`.
        root: Folder that torchvision keeps its files in.
        download: Let torchvision download what is missing.
    """
    if name in TIMM_NAMES:
        dataset = create_dataset(f'torch/{name}', root=root, split=split, download=download)
        if isinstance(dataset, tv.DatasetFolder):
            dataset.loader = open_image  # torchvision's own makes black and white of grey of 16 bits
        return dataset, 0
    row = TORCH_SETS[name]
    kwargs = dict(row.kwargs, root=root, download=download)
    if row.splits:
        kwargs[row.argument] = split == 'train' if row.argument == 'train' else split
    return getattr(tv, row.cls)(**kwargs), row.label_offset


def torch_labels(dataset: Any) -> np.ndarray | None:
    """All labels of a torchvision data set as it stores them, (N,), or None where it does not store them."""
    for name in ('targets', 'labels', '_labels', 'y'):
        if (values := getattr(dataset, name, None)) is not None:
            labels = np.asarray(values)
            # QMNIST keeps eight columns per image, the class first
            return (labels[:, 0] if labels.ndim == 2 else labels).astype(np.int64)
    for name in ('_samples', 'samples'):
        if (pairs := getattr(dataset, name, None)) is not None:
            return np.asarray([pair[1] for pair in pairs], dtype=np.int64)
    return None


def torch_class_names(dataset: Any) -> list[str] | None:
    """Class names of a torchvision data set by index, or None."""
    names = getattr(dataset, 'classes', None) or getattr(dataset, 'categories', None)
    return [str(name) for name in names] if names is not None else None


# ---- digits ---------------------------------------------------------------------------------------------------------


_DIGITS_VALIDATION = 0.2
_DIGITS_SPLITS = ('train', 'validation')


class Digits:
    """The data set ``digits``: 1,797 handwritten digits, 8 x 8 pixels, grey, 10 classes, as PIL images of mode L.

    They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), which
    scikit-learn carries inside its wheel: real data with no download. Its grey levels 0 .. 16 become 0 .. 255.
    """

    def __init__(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise UserError("dataset digits: scikit-learn, which carries the images, is not installed; "
                            "pip install 'timm-spinal[digits]'") from e
        data = load_digits()
        self.images = np.round(data.images * (255 / 16)).astype(np.uint8)
        self.labels = data.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_digits(split: str) -> Split:
    """The 'train' (1,437 or so) or 'validation' (a fifth of each class) split, the same in every run."""
    if split not in _DIGITS_SPLITS:
        raise UserError(f'dataset digits: no split {split!r}; it has {" and ".join(_DIGITS_SPLITS)}')
    digits = Digits()
    whole = Split('digits', digits, digits.labels, [str(i) for i in range(10)])
    return whole.subset(stratified_split(digits.labels, _DIGITS_VALIDATION, seed=0)[_DIGITS_SPLITS.index(split)])


# ---- multimnist -----------------------------------------------------------------------------------------------------


CANVAS, SIDE, CLASSES = 36, 28, 10
_MNIST_VALIDATION = 0.1
_FOLDERS = ('', 'MNIST/raw', 'raw', 'mnist')  # torchvision's is the second
# split: file part of MNIST, and which piece of it
_MNIST_SPLITS = {'train': ('train', 0), 'validation': ('train', 1), 'test': ('t10k', None)}


class MultiMnist:
    """The data set ``multimnist``: pairs of MNIST digits that overlap (Sabour et al., https://arxiv.org/abs/1710.09829).

    ``pairs[i]`` is a PIL image of mode L, 36 x 36, and the memberships of its classes, (10,) float32 with two ones. Two
    digits of different classes, each shifted by 0 .. 8 pixels along either axis, are added and clipped at 255. Each
    split makes its pairs of digits of its own, so that no two splits share a digit image; in the script of XnODR they
    do, and nothing is clipped.

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


def open_multimnist(config: TrainConfig | ValidateConfig, split: str, training: bool = False) -> Split:
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
    if name not in _MNIST_SPLITS:
        raise UserError(f'dataset multimnist: no split {split!r}; it has train, validation and test')
    part, piece = _MNIST_SPLITS[name]
    images, labels = read_mnist(config.data_dir, part)
    if piece is not None:
        chosen = stratified_split(labels, _MNIST_VALIDATION, seed=0)[piece]
        images, labels = images[chosen], labels[chosen]
    if len(np.unique(labels)) < 2:
        raise UserError(f'dataset multimnist: the digits of split {name} are all of one class, but a pair needs two '
                        f'classes; check the files under {config.data_dir}')
    size = config.train_num_samples if training else config.val_num_samples
    pairs = MultiMnist(images, labels, size or len(labels), config.seed if training else 0)
    return Split(f'multimnist, split {name}', pairs, class_names=[str(i) for i in range(CLASSES)], multi_label=True)


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
                        f'classes (shapes {images.shape} and {labels.shape}); put the MNIST files there')
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a file of the idx format."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        if data[:3] != b'\0\0\x08':
            raise ValueError('not an idx file of bytes')
        shape = np.frombuffer(data, '>u4', data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape.astype(np.int64))
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as e:
        raise UserError(f'dataset multimnist: {path} cannot be read ({" ".join(str(e).split())}); download it '
                        'again') from e
