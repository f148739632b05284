"""Which files are images, a count of those that are not, and a timm reader of images in a tar file.

The reader of images in a folder is in `image_folder`. To both, the classes are the folders directly below the split,
and an image is of the first folder of its path. Order and numbers of classes and images are those of timm's readers,
which name a class by the last folder instead, and take whatever folder holds images for one.
"""
import importlib.util
import io
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, ImageFile, features
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from timm_spinal.errors import UserError

# Pillow names these formats, but EPS is drawn by Ghostscript and of MPEG only the head is read
_NOT_DECODED = {'EPS', 'MPEG'}
_NEEDED = {'JPEG': 'jpg', 'JPEG2000': 'jpg_2000', 'WEBP': 'webp', 'AVIF': 'avif'}  # format: feature of Pillow
_OPENED_AS_JPEG = 'MPO'  # has no opener of its own
_HEIF = ('.heic', '.heics', '.heif', '.heifs', '.hif')
# what operating systems and file servers leave behind, in lower case
_SYSTEM = {
    '@eadir', '@recently-snapshot', '@recycle', '@tmp', '@__thumb', '#recycle', '#snapshot', '__macosx', 'icon\r',
    'network trash folder', 'temporary items', 'thumbs.db', 'ehthumbs.db', 'ehthumbs_vista.db', 'desktop.ini',
    '$recycle.bin', 'recycler', 'system volume information', 'lost+found', 'lost.dir',
}
# kinds of files and folders that are passed over
HIDDEN, SYSTEM = 'hidden', 'of the operating system'
OTHER, HEIF = 'of other types', 'in HEIF, readable after pip install pillow-heif'
OUTSIDE, EMPTY = 'outside the class folders', 'without images'
LINKED_AGAIN, NO_TARGET, SPECIAL = 'linked a second time', 'linked to nothing', 'special'
NOT_MAPPED = 'of classes that the class map has not'


def image_suffixes() -> set[str]:
    """Suffixes, in lower case, of all formats whose pixels Pillow and its registered plugins decode by themselves."""
    register_heif()
    suffixes = Image.registered_extensions()
    lacking = {name for name, feature in _NEEDED.items() if not features.check(feature)}
    formats = {_OPENED_AS_JPEG} | {name for name, (opener, _) in Image.OPEN.items() if not _is_stub(opener)}
    formats -= _NOT_DECODED | lacking
    return {suffix.lower() for suffix, name in suffixes.items() if name in formats}


def register_heif() -> None:
    """Let Pillow open HEIF files where the package pillow-heif is installed."""
    if importlib.util.find_spec('pillow_heif') is not None:
        import pillow_heif
        pillow_heif.register_heif_opener()


def ignored(name: str) -> str:
    """The kind of a file or folder that is passed over whatever is in it, '' for any other."""
    if name.startswith('.'):  # also the resource forks of macOS, ._NAME
        return HIDDEN
    return SYSTEM if name.lower() in _SYSTEM else ''


def suffix_of(name: str) -> str:
    """From the last dot on, in lower case; '' without one."""
    stem, dot, end = name.rpartition('.')
    return f'.{end.lower()}' if dot and stem else ''


def natural_key(name: str) -> list[str | int]:
    """timm's order of files and classes, in which 10 comes after 9 and capitals do not count."""
    # as timm.utils.natural_key, but that takes a lone superscript for a number
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name.lower()))]


def shown(name: str) -> str:
    """A name on one line that can be printed anywhere."""
    return name if name.isprintable() else repr(name)[1:-1]


@dataclass
class PassedOver:
    """What a reader has passed over, by kind: names of files and folders, or what they have in common."""
    kinds: dict[str, Counter] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.kinds.setdefault(kind, Counter())[name] += 1

    def add_file(self, name: str) -> None:
        """A file that is no image."""
        suffix = suffix_of(name)
        self.add(HEIF if suffix in _HEIF else OTHER, suffix or name)

    def __str__(self) -> str:
        return ', '.join(f'{sum(names.values()):,} {kind} ({_examples(names)})' for kind, names in self.kinds.items())


def _examples(names: Counter, most: int = 3) -> str:
    first = [shown(name) if count == 1 else f'{count:,} {shown(name)}' for name, count in names.most_common(most)]
    return ', '.join(first) + (', ...' if len(names) > most else '')


def _is_stub(opener: object) -> bool:
    return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)


# ---- images by class ------------------------------------------------------------------------------------------------


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
            account = f'; skipped: {passed_over}' if passed_over.kinds else ''
            mapped = ' that the class map has' if class_map else ''
            raise UserError(f'data {root}: has no images in folders of classes{mapped}; check --data-dir and the split'
                            f'{account}')

    def __len__(self) -> int:
        return len(self.samples)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_heif()  # in a loader worker that does not inherit what this process has imported

    @property
    def files(self) -> list[Path]:
        """Files in which the images are: one for each image, or one in all."""
        raise NotImplementedError


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


def count_empty(classes: Iterable[str], images: list[tuple[str, Any]], passed_over: PassedOver) -> None:
    """Count the folders of classes that have no image."""
    filled = {name for name, _ in images}
    for name in classes:
        if name not in filled:
            passed_over.add(EMPTY, name)


# ---- images in a tar file -------------------------------------------------------------------------------------------


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
        in_order = sorted(scan.images.items(), key=lambda item: natural_key(item[1].name))
        above = _common_folders([parts for parts, _ in in_order])
        images = []
        for parts, place in in_order:
            if len(parts) > above + 1:
                images.append((parts[above], place))
            else:
                passed_over.add(OUTSIDE, parts[-1])
        top = in_order[0][0][:above] if in_order else ()
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
