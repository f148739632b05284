"""What a run says of its data before it starts."""
from collections.abc import Mapping

import numpy as np

from timm_spinal.errors import UserError

from .dataset import Source
from .image_files import shown
from .readers import ClassReader


def table(splits: Mapping[str, Source | None]) -> str:
    """A line for each split with its images, its classes, and the smallest and the largest of them.

    Args:
        splits: By name; None is left out.
    """
    rows = [('split', 'images', 'classes', 'smallest class', 'largest class')]
    rows += [(name, f'{len(source):,}', *_classes(source)) for name, source in splits.items() if source is not None]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        f'{cell:{">" if i in (1, 2) else "<"}{width}}' for i, (cell, width) in enumerate(zip(row, widths))).rstrip()
        for row in rows)


def passed_over(splits: Mapping[str, Source | None]) -> str:
    """A line for each folder or tar file of which something was not taken; '' where nothing was."""
    found = {f'{source.name}: passed over {source.passed_over}' for source in splits.values()
             if source is not None and source.passed_over}
    return '\n'.join(sorted(found))


def describe(splits: Mapping[str, Source | None]) -> str:
    """Both, as a run prints them."""
    return '\n'.join(filter(None, (table(splits), passed_over(splits))))


def check_classes(source: Source) -> None:
    """Refuse to train on one class.

    Raises:
        UserError: All images are of one class.
    """
    if source.labels is None or source.multi_label or len(found := np.unique(source.labels)) != 1:
        return
    advice = 'add images of another class'
    if isinstance(getattr(source.dataset, 'reader', None), ClassReader):
        advice = 'the classes are the folders directly below the split: if they lie deeper, name the folder above ' \
                 'them with --train-split or --data-dir'
    raise UserError(f'{source.name}: all {len(source):,} images are of one class, {_name(source, int(found[0]))}, and '
                    f'training needs two; {advice}')


def _classes(source: Source) -> tuple[str, str, str]:
    if source.labels is None or source.multi_label:
        return str(len(source.class_names or ()) or '?'), '', ''
    counts = np.bincount(source.labels, minlength=len(source.class_names or ()))
    last_of_largest = len(counts) - 1 - counts[::-1].argmax()
    smallest, largest = (f'{_name(source, int(i))} ({counts[i]:,})' for i in (counts.argmin(), last_of_largest))
    return str(np.count_nonzero(counts)), smallest, largest


def _name(source: Source, label: int, most: int = 30) -> str:
    names = source.class_names or ()
    name = shown(names[label]) if label < len(names) else str(label)
    return name if len(name) <= most else name[:most - 3] + '...'
