"""Where the files lie that lists and annotations name, and how large images are."""
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from os.path import isdir, isfile  # False, where pathlib's raise, for names that are too long
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from timm_spinal.errors import UserError
from timm_spinal.training.image_files import image_suffixes, shown
from timm_spinal.training.pixels import UNREADABLE, decoded_size


def image_size(file: Path, exif_transpose: bool = False) -> tuple[int, int]:
    """Width and height of an image as `Decoder` gives it where nothing says its size; 0, 0 where there is no such file.

    Raises:
        UserError: It is no image.
    """
    if not isfile(file):
        return 0, 0
    try:
        with Image.open(file) as image:
            return decoded_size(image, exif_transpose)
    except UNREADABLE as e:
        reason = ' '.join(str(e).split())
        raise UserError(f'image {shown(str(file))} cannot be read ({reason}); repair or remove it') from e


class _Folder:
    """The files of one folder by name and by stem, whatever the case and Unicode's form."""

    def __init__(self, path: Path, suffixes: Collection[str]):
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for file in sorted(path.iterdir()) if isdir(path) else ():
            if file.suffix.lower() in suffixes and file.is_file():
                self.by_name[_folded(file.name)].append(file)
                self.by_stem[_folded(file.stem)].append(file)


class FileFinder:
    """Finds files by the names that lists and annotations have for them.

    Args:
        folders: Folders that names start from, the likeliest first.
        suffixes: Of the files that are looked for, in lower case with the dot.
    """

    def __init__(self, folders: Sequence[Path], suffixes: Collection[str]):
        self.folders = folders
        self.suffixes = suffixes
        self._listed: dict[Path, _Folder] = {}

    def exact(self, name: str | PurePosixPath) -> Path | None:
        """The file of just this name in the first folder that has it, or None."""
        return next((path for folder in self.folders if isfile(path := folder / name)), None)

    def find(self, name: str, where: str) -> Path | None:
        """The file that a name means, or None.

        Tried one after the other, each in all folders: the name as it is; with ``\\`` as separator; without the folders
        in front of it, as paths of other machines have them; in another case; with another suffix or none.

        Args:
            name: The name.
            where: Names what has it, in errors.

        Raises:
            UserError: It could be several files.
        """
        paths = list(_shorter(name))
        if found := self.exact(name) or next((found for path in paths if (found := self.exact(path))), None):
            return found
        for path in paths:
            if files := self._alike(path, path.name, 'by_name'):
                return _only(files, where)
        return self.by_stem(name, where)

    def by_stem(self, name: str, where: str, prefer: str = '') -> Path | None:
        """The file of this name whatever its suffix, or None.

        Args:
            name: With or without a suffix.
            where: Names what has it, in errors.
            prefer: The name of the file to take where several have this stem.

        Raises:
            UserError: It could be several files.
        """
        for path in _shorter(name):
            stems = [path.name, *([path.stem] if path.suffix.lower() in {*self.suffixes, *image_suffixes()} else [])]
            for stem in stems:
                if files := self._alike(path, stem, 'by_stem'):
                    return _only([file for file in files if file.name == prefer] or files, where)
        return None

    def _alike(self, path: PurePosixPath, wanted: str, kind: Literal['by_name', 'by_stem']) -> list[Path]:
        """The files of this name or stem in the first folder that has any; those in the same case, if there are."""
        for folder in self.folders:
            parent = folder / path.parent
            if parent not in self._listed:
                self._listed[parent] = _Folder(parent, self.suffixes)
            if files := getattr(self._listed[parent], kind).get(_folded(wanted)):
                return [f for f in files if wanted in (f.name, f.stem)] or files
        return []


def _only(files: Sequence[Path], where: str) -> Path:
    if len(files) > 1:
        one, other = (shown(file.name) for file in files[:2])
        raise UserError(f'{where}: {one} and {other} in {shown(str(files[0].parent))} could both be meant; keep one of '
                        'them or write its whole name')
    return files[0]


def _shorter(name: str) -> Iterator[PurePosixPath]:
    """The path of a name with ``/`` or ``\\`` between its parts, then without its first folder, and so on."""
    parts = [part for part in name.strip().replace('\\', '/').split('/') if part not in ('', '.', '..')]
    return (PurePosixPath(*parts[start:]) for start in range(len(parts)))


def _folded(text: str) -> str:
    return unicodedata.normalize('NFC', text).casefold()
