"""A timm reader of images in folders by class; that of tar files is in `tar_reader`.

The classes are the folders directly below the split, and an image is of the first folder of its path. Order and
numbers of classes and images are those of timm's readers, which name a class by the last folder instead, and take
whatever folder holds images for one.
"""
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from timm_spinal.errors import UserError

from .image_files import (
    EMPTY,
    LINKED_AGAIN,
    NO_TARGET,
    NOT_MAPPED,
    OTHER,
    OUTSIDE,
    SPECIAL,
    PassedOver,
    ignored,
    image_suffixes,
    natural_key,
    register_heif,
    shown,
    suffix_of,
)

FOLDER, IMAGE = 'folder', 'image'  # kinds of what is not passed over


class ClassReader(Reader):
    """Images and their classes.

    Attributes:
        root: The split's folder or tar file.
        samples: Place of an image and its class, for every image in order.
        class_to_idx: Class name to index.
        passed_over: What is there and was not taken.
    """

    def __init__(self, root: str, class_map: Any, images: list[tuple[str, Any]], passed_over: PassedOver):
        """
        Args:
            root: The split's folder or tar file.
            class_map: Class name to index, or a file of that as timm has it; '' numbers the classes by their order.
            images: Class and place of each image, in order.
            passed_over: What was not taken so far.

        Raises:
            UserError: Class names that cannot be told apart or written down, or no image at all.
        """
        super().__init__()
        self.root, self.passed_over = root, passed_over
        names = {name for name, _ in images}
        given = load_class_map(class_map, root) if class_map else {}
        check_names({*names, *map(str, given)}, root)
        ordered = sorted(names, key=lambda name: (natural_key(name), name))
        self.class_to_idx: dict[str, int] = given or {name: i for i, name in enumerate(ordered)}
        self.samples = [(place, self.class_to_idx[name]) for name, place in images if name in self.class_to_idx]
        for name, _ in images:
            if name not in self.class_to_idx:
                passed_over.add(NOT_MAPPED, name)
        if not self.samples:
            account = f'; passed over: {passed_over}' if passed_over.kinds else ''
            raise UserError(f'data {root}: holds no images in folders named by class'
                            f'{" of the class map" if class_map else ""}; check --data-dir and the split{account}')

    def __len__(self) -> int:
        return len(self.samples)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_heif()  # in a loader worker that does not inherit what this process has imported

    @property
    def files(self) -> list[Path]:
        """Files in which the images are: one for each image, or one in all."""
        raise NotImplementedError


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
        paths, classes = _scan_folder(root, set(suffixes) or image_suffixes(), passed_over)
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


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse class names that look the same or that no file can hold.

    Raises:
        UserError: Two names that differ in their Unicode form only, or one that is not UTF-8.
    """
    forms: dict[str, str] = {}
    for name in sorted(names):
        if any('\ud800' <= char <= '\udfff' for char in name):
            raise UserError(f'data {where}: the class folder {shown(name)} has a name that is not UTF-8; rename it')
        other = forms.setdefault(unicodedata.normalize('NFC', name), name)
        if other != name:
            raise UserError(f'data {where}: the classes {ascii(other)} and {ascii(name)} look the same ({name}) and '
                            f'differ only in their Unicode form; give both the same name')


def _scan_folder(root: str, suffixes: set[str], passed_over: PassedOver) -> tuple[list[str], list[str]]:
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
    """`FOLDER`, `IMAGE` or the kind of what is passed over."""
    if kind := ignored(entry.name):
        return kind
    if _follow(entry, 'is_dir'):
        return FOLDER
    broken = entry.is_symlink() and not os.path.exists(entry.path)
    if suffix_of(entry.name) not in suffixes:
        return NO_TARGET if broken else OTHER
    # a link to nothing counts as an image that cannot be read, so that it is not lost without a word
    return IMAGE if broken or _follow(entry, 'is_file') else SPECIAL


def _follow(entry: os.DirEntry, method: str) -> bool:
    try:
        return getattr(entry, method)()
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def count_empty(classes: Iterable[str], images: list[tuple[str, Any]], passed_over: PassedOver) -> None:
    """Count the folders of classes that have no image."""
    filled = {name for name, _ in images}
    for name in classes:
        if name not in filled:
            passed_over.add(EMPTY, name)
