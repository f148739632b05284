"""torchvision's data sets by name: those that timm's `create_dataset` knows, and a table of those that it does not."""
from dataclasses import dataclass
from typing import Any

import numpy as np
import torchvision.datasets as tv
from timm.data import create_dataset

from timm_spinal.errors import UserError

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
    found = [s for s in wanted if s in splits] if split in TRAIN_NAMES + EVAL_NAMES else []
    if found:
        return found[0]
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
