"""Three splits of any data set: train, validation to choose by, test to read once."""
from dataclasses import dataclass, replace

import numpy as np

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.dataset import Split, stratified_split
from timm_spinal.training.image_folder import find_split
from timm_spinal.training.named_datasets import NAMES, torch_split
from timm_spinal.training.splits import STREAMED, create_datasets

VALIDATION_FRACTION = 0.1


@dataclass
class Splits:
    """Sources of the three splits and a sentence on where they come from."""
    train: Split
    validation: Split
    test: Split
    num_classes: int
    class_names: list[str] | None
    note: str

    def named(self) -> dict[str, Split]:
        return dict(train=self.train, validation=self.validation, test=self.test)


def three_way(config: TrainConfig) -> tuple[TrainConfig, str]:
    """Settings by which the trainer has a validation split and a test split apart from it.

    A set with both keeps both. One with a single held-out split keeps that for the test, and validation is cut from
    the training split, stratified by class. Splits that the config names itself are kept.

    Returns:
        The config, and a sentence on the splits. ``test_split`` of the config stays '' where the data have one split
        only; `open_splits` then cuts a test split too.
    """
    prefix = config.dataset.partition('/')[0].lower()
    if prefix in STREAMED:
        raise UserError(f'dataset {config.dataset}: a streamed source cannot be split into three; use hfds/ or a '
                        f'folder')
    held_out = _held_out(config)
    test = config.test_split or next((name for name in ('test', 'validation') if name in held_out), '')
    changed = replace(config, test_split=held_out.get(test, test))
    if not test:
        return replace(changed, val_split_fraction=config.val_split_fraction or VALIDATION_FRACTION), ''
    validation = held_out.get(config.val_split, config.val_split)
    has_own = config.val_split in held_out and validation != changed.test_split
    if has_own and not config.val_split_fraction:
        return replace(changed, val_split=validation), f'Validation: the split {validation}; test: the split ' \
                                                       f'{changed.test_split}.'
    fraction = config.val_split_fraction or VALIDATION_FRACTION
    note = f'Validation: {100 * fraction:g} % of each class of {config.train_split}; test: the split ' \
           f'{changed.test_split}.'
    return replace(changed, val_split_fraction=fraction), note


def open_splits(config: TrainConfig, test_fraction: float = 0.2, train_size: int = 0) -> Splits:
    """Open three splits that share no image, the same for every seed of a comparison.

    Args:
        config: Where the data are; its seed decides what is cut.
        test_fraction: Part of each class cut for the test where the data have one split only.
        train_size: Use a stratified part of so many training images, when above 0.

    Raises:
        UserError: Missing or streamed data, a class too small to be split, or test labels that training has not.
    """
    config, note = three_way(config)
    if config.test_split:
        datasets = create_datasets(config)
        train, validation, test = _train(datasets.train), datasets.eval, datasets.test
        assert test is not None
        least = 2 if config.val_split_fraction else 1
    else:
        datasets = create_datasets(replace(config, val_split_fraction=test_fraction))
        rest, test = _train(datasets.train), datasets.eval
        least = 3
        _check_class_sizes(_joined(rest, test), datasets.class_names, least)
        first, second = stratified_split(_labels(rest), config.val_split_fraction, config.seed + 1)
        train, validation = rest.subset(first), rest.subset(second)
        note = f'The data have one split only. Test: {100 * test_fraction:g} % of each class; validation: ' \
               f'{100 * config.val_split_fraction:g} % of the rest.'
    if not datasets.multi_label:  # else splits and classes are the set's own
        whole = _joined(train, validation) if config.val_split_fraction else _labels(train)
        _check_class_sizes(whole, datasets.class_names, least)
        for source in (validation, test):
            _check_labels(source, train, datasets.class_names)
    if train_size:
        train = _part(train, train_size, config.seed)
        note += f' Training: a stratified part of {train_size:,} images.'
    return Splits(train, validation, test, datasets.num_classes, datasets.class_names, note)


def _held_out(config: TrainConfig) -> dict[str, str]:
    """Held-out splits that the data have: role ('validation', 'test') -> the set's own name."""
    prefix, _, name = config.dataset.partition('/')
    if config.dataset == 'digits':
        return dict(validation='validation')
    if prefix.lower() == 'torch' and name.lower() in NAMES:
        return _existing(lambda split: torch_split(name.lower(), split))
    if not config.dataset or prefix.lower() in ('folder', 'image_folder'):
        def look(split: str) -> str:
            find_split(config.data_dir, split)
            return split
        return _existing(look)
    # readers that can only be asked for a split by name
    return dict(validation=config.val_split, test=config.test_split or 'test')


def _existing(look) -> dict[str, str]:
    splits = {}
    for role in ('validation', 'test'):
        try:
            splits[role] = look(role)
        except UserError:
            continue
    if splits.get('validation') == splits.get('test'):
        splits.pop('validation', None)
    return splits


def _train(source: Split | None) -> Split:
    assert source is not None
    return source


def _labels(source: Split) -> np.ndarray:
    if source.labels is None:
        raise UserError(f'{source.name}: its labels are known only after reading it, so it cannot be split by class; '
                        f'use a folder, hfds/ or torch/')
    return source.labels


def _joined(*sources: Split) -> np.ndarray:
    return np.concatenate([_labels(source) for source in sources])


def _check_class_sizes(labels: np.ndarray, names: list[str] | None, least: int) -> None:
    counts = np.bincount(labels, minlength=len(names or ()))
    small = [c for c in np.unique(labels) if counts[c] < least]
    if small:
        raise UserError(f'class {_name(small[0], names)}: has {counts[small[0]]} '
                        f'image{"s" if counts[small[0]] != 1 else ""}, but cutting the splits needs {least} of each '
                        f'class{_more(small)}; add images or remove the class')


def _check_labels(source: Split, train: Split, names: list[str] | None) -> None:
    unknown = np.setdiff1d(_labels(source), _labels(train))
    if len(unknown):
        raise UserError(f'{source.name}: class {_name(unknown[0], names)} is not in the training split'
                        f'{_more(unknown)}; add training images of it or remove it')


def _more(classes) -> str:
    return f' ({len(classes) - 1} more classes likewise)' if len(classes) > 1 else ''


def _name(label: int, names: list[str] | None) -> str:
    return names[label] if names and label < len(names) else str(label)


def _part(train: Split, size: int, seed: int) -> Split:
    labels = _labels(train)
    classes = len(np.unique(labels))
    if size > len(labels):
        raise UserError(f'--train-size {size}: the training split has {len(labels)} images; give as many or fewer')
    if size < classes:
        raise UserError(f'--train-size {size}: there are {classes} classes; give at least {classes}')
    if size == len(labels):
        return train
    _, chosen = stratified_split(labels, size / len(labels), seed)
    # rounding within the classes leaves a few too many or too few
    order = np.random.default_rng(seed).permutation
    if len(chosen) > size:
        counts = np.bincount(labels[chosen])
        spare = [i for i in order(chosen) if counts[labels[i]] > 1]
        chosen = np.setdiff1d(chosen, spare[:len(chosen) - size])
    elif len(chosen) < size:
        rest = order(np.setdiff1d(np.arange(len(labels)), chosen))
        chosen = np.union1d(chosen, rest[:size - len(chosen)])
    return train.subset(chosen)
