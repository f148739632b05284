"""A timm reader of images in a tar file, by the rules of `readers`."""
import io
import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .image_files import (
    LINKED_AGAIN,
    NO_TARGET,
    OUTSIDE,
    SPECIAL,
    PassedOver,
    ignored,
    image_suffixes,
    natural_key,
    suffix_of,
)
from .readers import ClassReader, count_empty

Parts = tuple[str, ...]  # of a path within the file


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
        count_empty(classes, images, passed_over)
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
