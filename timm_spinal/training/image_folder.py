"""Folders and tar files of images: where a split lies, its classes, and a timm reader of images in a folder."""
import hashlib
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from timm.data import ImageDataset

from timm_spinal.errors import UserError

from .dataset import Split
from .image_files import (
    LINKED_AGAIN,
    NO_TARGET,
    OTHER,
    OUTSIDE,
    SPECIAL,
    ClassReader,
    PassedOver,
    TarReader,
    count_empty,
    ignored,
    image_suffixes,
    natural_key,
    shown,
    suffix_of,
)
from .named_datasets import EVAL_NAMES, TRAIN_NAMES

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
    root = Path(os.path.expanduser(data_dir))
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
                        '--val-split-fraction 0.1 or give a folder with one tar for each split')
    group = next((g for g in (TRAIN_NAMES, EVAL_NAMES) if split in g), ())
    for name in dict.fromkeys((split, *group)):
        for path in (root / name, root / f'{name}.tar'):
            if path.exists():
                return path
    inside = sorted(p.name for p in root.iterdir()
                    if not ignored(p.name) and (p.is_dir() or p.suffix == '.tar'))
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
        deeper = [name for name in inside if any((root / name / part).is_dir() for part in _SPLIT_NAMES)]
        advice = f'did you mean {root / deeper[0]}?' if deeper else advice
    raise UserError(f'data folder {root}: no split {split!r} in it (it contains {_some(inside)}); {advice}')


def open_images(path: Path, class_map: Any = '', input_key: str | None = None) -> ImageDataset:
    """timm's data set over a folder or tar file, without transforms; its ``reader`` is a `ClassReader`.

    Args:
        path: The split.
        class_map: Class name to index, or a file of that.
        input_key: Suffixes of the images of a folder, separated by semicolons, in place of all that can be decoded.

    Raises:
        UserError: No images, not a tar file, or an unreadable class map.
    """
    if isinstance(class_map, str) and class_map and not (Path(class_map).exists() or (path / class_map).exists()):
        raise UserError(f'class map {class_map}: does not exist; check --class-map')
    reader: ClassReader
    try:
        if path.suffix == '.tar' and path.is_file():
            reader = TarReader(str(path), class_map)
        else:
            reader = FolderReader(str(path), class_map, input_key.split(';') if input_key else ())
    except UserError:
        raise
    except tarfile.TarError as e:
        raise UserError(f'data {path}: is not a tar file that can be read ({_line(e)}); create it again, without '
                        'compression') from e
    except Exception as e:  # a class map that cannot be parsed
        raise UserError(f'data {path}: cannot be read ({_line(e)}); check the file and --class-map') from e
    return ImageDataset(str(path), reader, input_img_mode='')


def _some(names: list[str], most: int = 6) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


# ---- images in a folder ---------------------------------------------------------------------------------------------


FOLDER, IMAGE = 'folder', 'image'  # kinds of what is taken


class FolderReader(ClassReader):
    """Images in a folder. A place in ``samples`` is a path.

    Links to folders are followed, but no folder is read twice.

    Args:
        root: The split's folder.
        class_map: As for `ClassReader`.
        suffixes: Suffixes to take for images in place of all that can be decoded.

    Raises:
        UserError: A folder that cannot be read; see also `ClassReader`.
    """

    def __init__(self, root: str, class_map: Any = '', suffixes: Iterable[str] = ()):
        passed_over = PassedOver()
        paths, classes = scan_folder(root, set(suffixes) or image_suffixes(), passed_over)
        images = []
        for path in sorted(paths, key=lambda path: (natural_key(path), path)):
            name, sep, _ = path.partition(os.sep)
            if sep:
                images.append((name, os.path.join(root, path)))
            else:
                passed_over.add(OUTSIDE, path)
        count_empty(classes, images, passed_over)
        super().__init__(root, class_map, images, passed_over)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    @property
    def files(self) -> list[Path]:
        return [Path(path) for path, _ in self.samples]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def scan_folder(root: str, suffixes: set[str], passed_over: PassedOver) -> tuple[list[str], list[str]]:
    """Paths of all images below a folder, relative to it, and the folders directly in it."""
    images: list[str] = []
    folders: list[str] = []
    # links come last, so that a folder is taken by its own name; the folders above are known: a link to one of them
    # would lead back to here
    pending: list[str] = ['']
    links: list[str] = []
    seen = {_identity(path) for path in Path(root).resolve().parents}
    while pending or links:
        path = pending.pop() if pending else links.pop(0)
        place = os.path.join(root, path) if path else root
        try:
            identity = _identity(place)
            if identity in seen:
                passed_over.add(LINKED_AGAIN, path)
                continue
            seen.add(identity)
            if path and os.sep not in path:
                folders.append(path)
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    name, kind = os.path.join(path, entry.name), _kind(entry, suffixes)
                    if kind == FOLDER:
                        (links if entry.is_symlink() else pending).append(name)
                    elif kind == IMAGE:
                        images.append(name)
                    elif kind == OTHER:
                        passed_over.add_file(entry.name)
                    else:
                        passed_over.add(kind, entry.name)
        except OSError as e:
            raise UserError(f'data folder {shown(place)}: cannot be read ({e.strerror}); check its permissions, or '
                            f'remove it') from e
    return images, folders


def _kind(entry: os.DirEntry, suffixes: set[str]) -> str:
    """`FOLDER`, `IMAGE`, or the kind under which it is passed over."""
    if kind := ignored(entry.name):
        return kind
    if _follow(entry, 'is_dir'):
        return FOLDER
    broken = entry.is_symlink() and not os.path.exists(entry.path)
    if suffix_of(entry.name) not in suffixes:
        return NO_TARGET if broken else OTHER
    # a link to nothing counts as an image that cannot be read, so that the run stops and names it
    return IMAGE if broken or _follow(entry, 'is_file') else SPECIAL


def _follow(entry: os.DirEntry, method: str) -> bool:
    try:
        return getattr(entry, method)()
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def hash_split(split: Split, strict: bool = False) -> str | None:
    """Hash of a split: its name, labels and images.

    Images in files count by path, size and date, those in memory by their values; of other readers only name, length
    and labels are known.

    Args:
        split: The split.
        strict: None where the images are not known.
    """
    digest = hashlib.sha256(f'{len(split)}'.encode())
    digest.update(np.ascontiguousarray(split.labels if split.labels is not None else []).tobytes())
    digest.update(np.ascontiguousarray(split.indices if split.indices is not None else []).tobytes())
    dataset = split.dataset
    reader, samples = getattr(dataset, 'reader', None), getattr(dataset, '_samples', None)
    if isinstance(reader, ClassReader):
        files = reader.files
    else:  # torchvision's sets have a list of (file, class), or of other things, under that name
        files = [Path(s[0]) for s in samples if isinstance(s[0], (str, Path))] if isinstance(samples, list) else []
    if len(files) == len(dataset) and split.indices is not None:
        files = [files[i] for i in split.indices]
    if files:
        for path in files:
            digest.update(_stat(path))
    else:
        digest.update(split.name.encode())
        values = getattr(dataset, 'data', None) if hasattr(dataset, 'data') else getattr(dataset, 'images', None)
        if isinstance(values, (np.ndarray, torch.Tensor)):
            digest.update(np.ascontiguousarray(values).tobytes())
        elif strict:
            return None
    return digest.hexdigest()


def _stat(path: Path) -> bytes:
    try:
        stat = path.stat()
    except OSError as e:
        raise UserError(f'image {path}: cannot be read ({e.strerror}); check the data') from e
    return f'{path.name}\n{path.parent.name}\n{stat.st_size}\n{stat.st_mtime_ns}\n'.encode(errors='surrogateescape')
