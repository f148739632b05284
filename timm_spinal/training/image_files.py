"""Which files are images, and an account of those that are not."""
import importlib.util
import re
from collections import Counter
from dataclasses import dataclass, field

from PIL import Image, ImageFile, features

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
# kinds of what is passed over
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
