"""Folders and tar files of images: where a split lies, and its classes."""
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions

from timm_spinal.errors import UserError

from .torch_sources import EVAL_NAMES, TRAIN_NAMES

_SPLIT_NAMES = (*TRAIN_NAMES, *EVAL_NAMES, 'test')


def find_split(data_dir: str, split: str, whole: bool = False) -> Path:
    """The folder or tar file that holds a split.

    A split is ``data_dir/SPLIT`` or ``data_dir/SPLIT.tar``; 'train' and 'validation' also find their synonyms (val,
    valid, ...). timm takes `data_dir` itself where it finds no split; here that is only done when asked for.

    Args:
        data_dir: The data set's folder, or one .tar file.
        split: Name of the split.
        whole: `data_dir` itself is the split when it holds classes and no splits, or is a tar file.

    Raises:
        UserError: No such folder, or no such split in it.
    """
    root = Path(data_dir)
    if not data_dir:
        raise UserError('no data: give a folder with --data-dir or a source with --dataset (for instance digits)')
    if not root.exists():
        raise UserError(f'data folder {root}: does not exist; check --data-dir')
    if root.is_file():
        if root.suffix != '.tar':
            raise UserError(f'data {root}: is neither a folder nor a .tar file; check --data-dir')
        if whole:
            return root
        raise UserError(f'data {root}: a single tar file has no split {split!r}; cut one from it with '
                        f'--val-split-fraction 0.1 or give a folder that holds one tar for each split')
    group = next((g for g in (TRAIN_NAMES, EVAL_NAMES) if split in g), ())
    for name in dict.fromkeys((split, *group)):
        for path in (root / name, root / f'{name}.tar'):
            if path.exists():
                return path
    inside = sorted(p.name for p in root.iterdir() if p.is_dir() or p.suffix == '.tar')
    if not inside:
        raise UserError(f'data folder {root}: is empty; it needs one folder (or tar) for each split, with one folder '
                        f'of images for each class in it')
    splits = [name for name in inside if Path(name).stem in _SPLIT_NAMES]
    if whole and not splits:
        return root
    if splits:
        advice = 'name one of them with --train-split or --val-split'
        if split not in TRAIN_NAMES:
            advice += ', or cut one from the training split with --val-split-fraction 0.1'
    else:
        advice = 'if these are the classes, cut an evaluation split with --val-split-fraction 0.1'
    raise UserError(f'data folder {root}: no split {split!r} in it (it holds {_some(inside)}); {advice}')


def open_images(path: Path, class_map: Any = '', input_key: str | None = None) -> Any:
    """timm's data set over a folder or tar file, without transforms.

    Raises:
        UserError: No images, not a tar file, or an unreadable class map.
    """
    kwargs: dict[str, Any] = dict(input_key=input_key)
    if path.suffix == '.tar':
        # timm would keep a pickle beside tars of more than 10 GB and trust it later
        kwargs = dict(cache_tarinfo=False)
    if isinstance(class_map, str) and class_map and not (Path(class_map).exists() or (path / class_map).exists()):
        raise UserError(f'class map {class_map}: does not exist; check --class-map')
    try:
        return create_dataset('', root=str(path), search_split=False, class_map=class_map, input_img_mode='', **kwargs)
    except (RuntimeError, ValueError, AssertionError) as e:
        kinds = ', '.join(get_img_extensions())
        raise UserError(f'data {path}: holds no images ({kinds}) in folders named by class'
                        f'{" of the class map" if class_map else ""}; check --data-dir and the split') from e
    except Exception as e:  # tarfile's errors, PermissionError, a class map that cannot be parsed
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise UserError(f'data {path}: cannot be read ({reason}); check the file and --class-map') from e


def class_index(reader: Any) -> dict[str, int]:
    """Class name to index of timm's folder and tar readers."""
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}


def _some(names: list[str], most: int = 6) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
