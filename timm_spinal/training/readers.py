"""timm readers of images in folders by class, on the disk or in a tar file.

The classes are the folders directly below the split, and an image is of the first folder of its path. Order and
numbers of classes and images are those of timm's readers, which name a class by the last folder instead, and take
whatever folder holds images for one.
"""
import io
import os
import tarfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from timm_spinal.errors import UserError

from .image_files import (
    EMPTY,
    LINKED_AGAIN,
    NO_TARGET,
    NOT_MAPPED,
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

Parts = tuple[str, ...]  # of a path within the split


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
        _count_empty(classes, images, passed_over)
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


class TarImage(NamedTuple):
    """Place of an image in a tar file."""
    name: str
    offset: int
    size: int


class TarReader(ClassReader):
    """Images in a tar file, or in tar files within it. A place in ``samples`` is a `TarImage`.

    A folder around all the others, as in a tar of the split's folder, is no class. A tar within the file stands for a
    folder of its name. The last of several members of one name is taken, as in unpacking.

    Args:
        root: The tar file, not compressed.
        class_map: As for `ClassReader`.

    Raises:
        tarfile.TarError: No tar file, a compressed or a damaged one.
        UserError: See `ClassReader`.
    """

    def __init__(self, root: str, class_map: Any = ''):
        passed_over = PassedOver()
        scan = _TarScan(image_suffixes(), passed_over)
        with tarfile.open(root, 'r:') as tar:
            scan.add(tar)
        scan.follow_links()
        found = sorted(scan.images.items(), key=lambda item: natural_key(item[1].name))
        above = _common_folders([parts for parts, _ in found])
        images = []
        for parts, place in found:
            if len(parts) > above + 1:
                images.append((parts[above], place))
            else:
                passed_over.add(OUTSIDE, parts[-1])
        top = found[0][0][:above] if found else ()
        classes = [parts[above] for parts in scan.folders if len(parts) == above + 1 and parts[:above] == top]
        _count_empty(classes, images, passed_over)
        super().__init__(root, class_map, images, passed_over)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        place, target = self.samples[index]
        # opened each time: a file that is kept open would be shared by loader workers, with its position
        with open(self.root, 'rb', buffering=0) as file:
            file.seek(place.offset)
            data = file.read(place.size)
        if len(data) < place.size:
            raise OSError(f'{self.root} ends within it')
        return io.BytesIO(data), target

    @property
    def files(self) -> list[Path]:
        path = Path(self.root)
        return [path.parent.resolve() / path.name]  # the same however it is named

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0].name
        if basename:
            return os.path.basename(name)
        return os.path.join(self.root, name) if absolute else name


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


# ---- on the disk ------------------------------------------------------------------------------------------------


def _scan_folder(root: str, suffixes: set[str], passed_over: PassedOver) -> tuple[list[str], list[str]]:
    """Paths of all images below a folder, relative to it, and the folders directly in it."""
    images: list[str] = []
    folders: list[str] = []
    # links come last, so that a folder is taken by its own name; one that leads to where we are would never end
    pending, links = [''], []
    seen = {_identity(path) for path in Path(root).resolve().parents}
    while pending or links:
        path = pending.pop() if pending else links.pop(0)
        place = os.path.join(root, path)
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
                    name = os.path.join(path, entry.name)
                    if kind := ignored(entry.name):
                        passed_over.add(kind, entry.name)
                    elif _follow(entry, 'is_dir'):
                        (links if entry.is_symlink() else pending).append(name)
                    elif suffix_of(entry.name) not in suffixes:
                        if _is_broken(entry):
                            passed_over.add(NO_TARGET, entry.name)
                        else:
                            passed_over.add_file(entry.name)
                    elif _follow(entry, 'is_file') or _is_broken(entry):
                        images.append(name)
                    else:
                        passed_over.add(SPECIAL, entry.name)
        except OSError as e:
            raise UserError(f'data folder {shown(place)}: cannot be read ({e.strerror}); check its permissions, or '
                            f'remove it') from e
    return images, folders


def _identity(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _follow(entry: os.DirEntry, method: str) -> bool:
    try:
        return getattr(entry, method)()
    except OSError:  # a link to itself
        return False


def _is_broken(entry: os.DirEntry) -> bool:
    """A link to nothing counts as an image that cannot be read, so that it is not lost without a word."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _count_empty(classes: Iterable[str], images: list[tuple[str, Any]], passed_over: PassedOver) -> None:
    filled = {name for name, _ in images}
    for name in classes:
        if name not in filled:
            passed_over.add(EMPTY, name)


# ---- in a tar file ----------------------------------------------------------------------------------------------


class _TarScan:
    """Members of a tar file by the parts of their path."""

    def __init__(self, suffixes: set[str], passed_over: PassedOver):
        self.suffixes, self.passed_over = suffixes, passed_over
        self.images: dict[Parts, TarImage] = {}
        self.folders: dict[Parts, None] = {}
        self._links: dict[Parts, tuple[str, Parts]] = {}
        self._ignored: set[Parts] = set()

    def add(self, tar: tarfile.TarFile, above: Parts = (), start: int = 0) -> None:
        """All members.

        Args:
            tar: The file.
            above: Path of the folder for which it stands.
            start: Where its content begins in the outermost file.
        """
        for info in tar:
            parts = above + _parts(info.name)
            if not parts or self._is_ignored(parts):
                continue
            suffix = suffix_of(parts[-1])
            if info.isdir():
                self.folders[parts] = None
            elif info.isreg() and suffix == '.tar':
                try:
                    with tarfile.open(fileobj=tar.extractfile(info), mode='r:') as inner:
                        self.add(inner, parts[:-1] + (parts[-1][:-len(suffix)],), start + info.offset_data)
                except tarfile.TarError as e:
                    raise tarfile.ReadError(f'{info.name} in it: {e}') from e
            elif suffix not in self.suffixes and not info.issym():
                self.passed_over.add_file(parts[-1])
            elif info.islnk() or info.issym():
                self._links[parts] = info.name, self._target(info, above, parts)
            elif info.isreg() and not info.issparse():
                self.images[parts] = TarImage(info.name, start + info.offset_data, info.size)
            else:
                self.passed_over.add(SPECIAL, parts[-1])

    def follow_links(self) -> None:
        """Give links the content of the members that they lead to."""
        folders = {*self.folders, *(parts[:i] for parts in self.images for i in range(len(parts)))}
        for parts, (name, target) in self._links.items():
            for _ in self._links:  # from link to link, but not round and round
                if target not in self._links:
                    break
                target = self._links[target][1]
            if target in self.images:
                self.images.setdefault(parts, self.images[target]._replace(name=name))
            elif target in folders:
                self.passed_over.add(LINKED_AGAIN, parts[-1])
            elif suffix_of(parts[-1]) in ('', *self.suffixes):
                self.passed_over.add(NO_TARGET, parts[-1])
            else:
                self.passed_over.add_file(parts[-1])

    def _target(self, info: tarfile.TarInfo, above: Parts, parts: Parts) -> Parts:
        if info.islnk():
            return above + _parts(info.linkname)
        return _parts(os.path.normpath(os.path.join(*parts[:-1], info.linkname)))

    def _is_ignored(self, parts: Parts) -> bool:
        for i, part in enumerate(parts):
            if kind := ignored(part):
                if parts[:i + 1] not in self._ignored:
                    self._ignored.add(parts[:i + 1])
                    self.passed_over.add(kind, part)
                return True
        return False


def _parts(name: str) -> Parts:
    return tuple(part for part in name.split('/') if part not in ('', '.'))


def _common_folders(paths: list[Parts]) -> int:
    """How many folders are around all classes: those that all images share and below which there are classes."""
    count = 0
    while paths and len({path[count] for path in paths}) == 1 and len(paths[0]) > count + 1:
        deeper = [path for path in paths if len(path) > count + 2]
        if len(deeper) < len(paths) and len({path[count + 1] for path in deeper}) < 2:
            break
        count += 1
    return count
