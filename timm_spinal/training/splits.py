"""The splits of a data set: opened by name, with classes that agree, and described in a table.

A data set has one of these names: '' is a folder or tar file, ``digits`` the digits of scikit-learn, ``multimnist``
pairs of MNIST digits, ``torch/`` a torchvision set, ``hfds/``, ``hfids/``, ``wds/`` and ``tfds/`` timm's readers of
these names. Failures come out as one-line errors that say what to do.
"""
import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from timm.data import create_dataset

from timm_spinal.errors import UserError

from .config import TrainConfig, ValidateConfig
from .dataset import Split, stratified_split
from .image_files import ClassReader, check_names, shown
from .image_folder import find_split, open_images
from .named_datasets import (
    NAMES,
    find_mnist,
    open_digits,
    open_multimnist,
    open_torch,
    torch_class_names,
    torch_labels,
    torch_split,
)

_logger = logging.getLogger(__name__)


@dataclass
class Datasets:
    """The splits of a run before any transform; ``train`` and ``test`` are None where they were not asked for."""
    train: Split | None
    eval: Split
    test: Split | None
    num_classes: int
    class_names: list[str] | None
    multi_label: bool = False

    def named(self, config: TrainConfig) -> dict[str, Split | None]:
        """The splits by the names that a config gives them."""
        validation = f'part of {config.train_split}' if config.val_split_fraction else config.val_split
        return {config.train_split: self.train, validation: self.eval, config.test_split: self.test}


def create_datasets(config: TrainConfig | ValidateConfig, train: bool = True) -> Datasets:
    """Open the splits that a config names and find their number of classes.

    Args:
        config: The run's config.
        train: Open the training split; validation needs the evaluation split only.

    Raises:
        UserError: Data that are missing, empty, unknown or inconsistent, one class only in training, or more classes
            than --num-classes.
    """
    train_split: Split | None
    if config.val_split_fraction:
        whole = open_split(config, config.train_split, whole=True)
        if whole.multi_label:
            raise UserError(f'--val-split-fraction: the pairs of {config.dataset} share digits, so both parts '
                            f'would have the same digits; leave it out: its split validation has other digits')
        if whole.labels is None:
            raise UserError(f'--val-split-fraction: the classes of {whole.name} are not known beforehand; '
                            f'name a split with --val-split')
        first, second = stratified_split(whole.labels, config.val_split_fraction, config.seed)
        train_split, eval_split = whole.subset(first), whole.subset(second)
    else:
        train_split = open_split(config, config.train_split, training=True) if train else None
        eval_split = _with_training_classes(config, config.val_split, train_split)
        _warn_if_test(config)
    test_split = _with_training_classes(config, config.test_split, train_split) if train and config.test_split else None
    if train and train_split is not None:
        check_classes(train_split)
    return Datasets(
        train_split if train else None,
        eval_split,
        test_split,
        _num_classes(config, [s for s in (train_split, eval_split, test_split) if s is not None]),
        (train_split or eval_split).class_names,
        eval_split.multi_label,
    )


def _with_training_classes(config: TrainConfig | ValidateConfig, name: str, train: Split | None) -> Split:
    """A split whose classes have the indices that they have in training."""
    split = open_split(config, name)
    if train is None or not train.class_names or not split.class_names or train.class_names == split.class_names:
        return split
    unknown = [class_name for class_name in split.class_names if class_name not in train.class_names]
    check_names({*train.class_names, *unknown}, split.name)
    if unknown:
        names = ', '.join(map(shown, unknown[:5])) + (', ...' if len(unknown) > 5 else '')
        raise UserError(f'classes: {split.name} has {len(unknown)} that {train.name} does not have ({names}); use the '
                        f'same class names in both')
    return open_split(config, name, class_map={class_name: i for i, class_name in enumerate(train.class_names)})


def _num_classes(config: TrainConfig | ValidateConfig, splits: list[Split]) -> int:
    counts = [len(s.class_names or ()) for s in splits]
    counts += [int(s.labels.max()) + 1 for s in splits if s.labels is not None and len(s.labels)]
    known = max(counts)
    if config.num_classes is None:
        if not known:
            raise UserError(f'dataset {config.dataset}: its classes are not known; give their number with '
                            f'--num-classes')
        return known
    if known > config.num_classes:
        raise UserError(f'--num-classes {config.num_classes}: the data have {known} classes; give {known} or leave it '
                        f'out')
    if any(split.multi_label for split in splits) and known < config.num_classes:
        raise UserError(f'--num-classes {config.num_classes}: dataset {config.dataset} has {known}; leave it out')
    if 0 < known < config.num_classes:
        _logger.warning(f'--num-classes {config.num_classes}: the data have {known} classes, the rest stays unused')
    return config.num_classes


def _warn_if_test(config: TrainConfig | ValidateConfig) -> None:
    prefix, _, name = config.dataset.partition('/')
    if not isinstance(config, TrainConfig) or prefix.lower() != 'torch' or config.val_split == 'test':
        return
    if torch_split(name.lower(), config.val_split) == 'test':
        _logger.warning(f'{config.dataset} has no validation split: the test split chooses the best epoch; '
                        f'--val-split-fraction 0.1 --test-split test keeps it for the end')


# ---- one split by its name ------------------------------------------------------------------------------------------


STREAMED = ('hfids', 'wds', 'tfds')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow-datasets tensorflow'}


def open_split(
        config: TrainConfig | ValidateConfig,
        split: str,
        training: bool = False,
        whole: bool = False,
        class_map: Any = None,
) -> Split:
    """Open one split.

    Args:
        config: Where the data are: `DataOptions`, and batch_size, workers and seed for streamed data sets.
        split: Name of the split.
        training: Streamed data sets shuffle when training; the number and the seed of multimnist's pairs depend on it.
        whole: A folder without splits, or a single tar file, is the split itself.
        class_map: Class name to index, in place of ``config.class_map``.

    Raises:
        UserError: The data set is unknown or missing, has no such split or cannot be downloaded.
    """
    prefix, sep, name = config.dataset.partition('/')
    prefix = prefix.lower()
    if not config.dataset or (prefix in ('folder', 'image_folder') and not sep):
        path = find_split(config.data_dir, split, whole)
        return folder_split(path, config.class_map if class_map is None else class_map, config.input_key)
    if config.dataset == 'digits':
        return open_digits(split)
    if config.dataset == 'multimnist':
        if config.dataset_download and config.data_dir and not find_mnist(config.data_dir, 'train', 'images-idx3'):
            _open_torch(config, 'mnist', 'train')
        return open_multimnist(config, split, training)
    if sep and prefix == 'torch':
        return _open_torch(config, name.lower(), split)
    if sep and prefix in _PACKAGES:
        return _open_reader(config, prefix, split, training)
    raise UserError(f'unknown dataset {config.dataset!r}; {_nearest(config.dataset)}')


def folder_split(path: Path, class_map: Any = '', input_key: str | None = None) -> Split:
    """A folder or tar file of images; arguments and errors are those of `open_images`."""
    dataset = open_images(path, class_map, input_key)
    reader: Any = dataset.reader
    labels = np.asarray([target for _, target in reader.samples], dtype=np.int64)
    return Split(str(path), dataset, labels, _names(reader.class_to_idx), passed_over=str(reader.passed_over))


def _open_torch(config: TrainConfig | ValidateConfig, name: str, split: str) -> Split:
    label = f'torch/{name}'
    if name not in NAMES:
        raise UserError(f'unknown dataset {config.dataset!r}; {_nearest(label)}')
    if not config.data_dir:
        raise UserError(f'dataset {label}: no folder for its files; give one with --data-dir')
    split = torch_split(name, split)
    try:
        dataset, offset = open_torch(name, split, config.data_dir, config.dataset_download)
    except URLError as e:
        raise UserError(f'dataset {label}: cannot be downloaded ({_line(e)}); check the network, or put its files '
                        f'under {config.data_dir}') from e
    except (RuntimeError, ValueError, OSError, AssertionError) as e:
        if config.dataset_download:
            raise UserError(f'dataset {label}: was not found, and not downloaded ({_line(e)}); check the network, or '
                            f'put its files under {config.data_dir}') from e
        raise UserError(f'dataset {label}: split {split} not found under {config.data_dir} ({_line(e)}); check '
                        f'--data-dir or add --dataset-download') from e
    except ImportError as e:
        raise UserError(f'dataset {label}: needs a package that is not installed ({_line(e)}); install it') from e
    labels, names = torch_labels(dataset), torch_class_names(dataset)
    labels = None if labels is None else labels - offset
    return Split(f'{label}, split {split}', dataset, labels, names[offset:] if names else None, offset)


def _open_reader(config: TrainConfig | ValidateConfig, prefix: str, split: str, training: bool) -> Split:
    label = f'{config.dataset}, split {split}'
    options: dict[str, Any] = dict(
        root=config.data_dir or None,
        split=split,
        class_map=config.class_map or None,
        is_training=training,
        download=config.dataset_download,
        batch_size=config.batch_size,
        num_samples=config.train_num_samples if training else config.val_num_samples,
        seed=config.seed,
        repeats=int(getattr(config, 'epoch_repeats', 0)) if training else 0,
        # '': as stored, for our own decoder; tfds makes arrays of one or three channels
        input_img_mode='' if prefix != 'tfds' else 'L' if config.input_img_mode == 'L' else 'RGB',
        input_key=config.input_key or None,
        target_key=config.target_key or None,
        trust_remote_code=config.dataset_trust_remote_code,
    )
    try:
        dataset = create_dataset(config.dataset, **options)
    except ImportError as e:
        raise UserError(f'dataset {config.dataset}: a package is not installed ({_line(e)}); '
                        f'pip install {_PACKAGES[prefix]}') from e
    except Exception as e:  # each library has its own; all mean that the split cannot be had
        raise UserError(f'dataset {label}: cannot be opened ({_line(e)}); check the name, the split, --data-dir and '
                        f'the network') from e
    names = _names(getattr(dataset.reader, 'class_to_idx', None) or {})
    if prefix in STREAMED:
        dataset.set_loader_cfg(num_workers=config.workers)
        if len(dataset) == 0:
            flag = '--train-num-samples' if training else '--val-num-samples'
            raise UserError(f'dataset {label}: its number of images is not known; give it with {flag}')
        return Split(label, dataset, None, names, streamed=True)
    return Split(label, dataset, np.asarray(list(dataset.reader.iter_targets()), dtype=np.int64), names)


def _names(index: dict[str, int]) -> list[str] | None:
    """Class names by index; a class map may leave indices out or give one to several names."""
    if not index:
        return None
    names = {int(i): str(name) for name, i in reversed(index.items())}
    return [names.get(i, str(i)) for i in range(max(names) + 1)]


def _nearest(name: str) -> str:
    known = ['digits', 'multimnist', *(f'torch/{n}' for n in NAMES)]
    full = name if '/' in name or name.startswith(('digit', 'multi')) else f'torch/{name}'
    close = [n for n in known if n.startswith(full)] or difflib.get_close_matches(full, known, n=1)
    if close:
        return f'did you mean {" or ".join(close[:6])}?'
    return ('use digits, multimnist, torch/NAME, hfds/NAME, hfids/NAME, wds/NAME or tfds/NAME, or --data-dir for a '
            'folder')


def _line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:300] or type(error).__name__


# ---- description ----------------------------------------------------------------------------------------------------


def split_table(splits: Mapping[str, Split | None]) -> str:
    """A line for each split with its images, its classes, and the smallest and the largest of them.

    Args:
        splits: By name; None is left out.
    """
    rows = [('split', 'images', 'classes', 'smallest class', 'largest class')]
    rows += [(name, f'{len(split):,}', *_classes(split)) for name, split in splits.items() if split is not None]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        f'{cell:{">" if i in (1, 2) else "<"}{width}}' for i, (cell, width) in enumerate(zip(row, widths))).rstrip()
        for row in rows)


def passed_over_lines(splits: Mapping[str, Split | None]) -> str:
    """A line for each folder or tar file of which something was not taken; '' where nothing was."""
    lines = {f'{split.name}: skipped {split.passed_over}' for split in splits.values()
             if split is not None and split.passed_over}
    return '\n'.join(sorted(lines))


def describe_splits(splits: Mapping[str, Split | None]) -> str:
    """The table of the splits, and what was passed over, as a run prints them."""
    return '\n'.join(filter(None, (split_table(splits), passed_over_lines(splits))))


def check_classes(split: Split) -> None:
    """Refuse to train on one class.

    Raises:
        UserError: All images are of one class.
    """
    if split.labels is None or split.multi_label or len(classes := np.unique(split.labels)) != 1:
        return
    advice = 'add images of another class'
    if isinstance(getattr(split.dataset, 'reader', None), ClassReader):
        advice = 'the classes are the folders directly below the split: if they lie deeper, name the folder above ' \
                 'them with --train-split or --data-dir'
    raise UserError(f'{split.name}: all {len(split):,} images are of the class {_name(split, int(classes[0]))}, but '
                    f'training needs two classes; {advice}')


def _classes(split: Split) -> tuple[str, str, str]:
    if split.labels is None or split.multi_label:
        return str(len(split.class_names or ()) or '?'), '', ''
    counts = np.bincount(split.labels, minlength=len(split.class_names or ()))
    last_of_largest = len(counts) - 1 - counts[::-1].argmax()
    smallest, largest = (f'{_name(split, int(i))} ({counts[i]:,})' for i in (counts.argmin(), last_of_largest))
    return str(np.count_nonzero(counts)), smallest, largest


def _name(split: Split, label: int, most: int = 30) -> str:
    names = split.class_names or ()
    name = shown(names[label]) if label < len(names) else str(label)
    return name if len(name) <= most else name[:most - 3] + '...'
