"""From an image file to pixels of 8 bits a channel in the mode that a model takes."""
import logging
import multiprocessing
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import IO, Callable, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageMode

_logger = logging.getLogger(__name__)

UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, tarfile.TarError,
    Image.DecompressionBombError,
)

BACKGROUND = 'white'  # behind transparent parts, as in a browser
_EXIF_KEYS = {'exif', 'xmp', 'XML:com.adobe.xmp', 'Raw profile type exif'}  # of Image.info, for getexif()
_STRAIGHT = {'La': 'LA', 'RGBa': 'RGBA'}  # from colours multiplied by alpha to colours as they are
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2  # tags of TIFF


class Levels(NamedTuple):
    """Range of grey levels; ``step`` is 1 where they are whole numbers and the highest is a step wide itself."""
    low: float
    high: float
    step: int = 0


# of images of 32 bits, in the order in which they are tried
_RANGES = (Levels(0, 1), Levels(-1, 1), Levels(0, 255, 1), Levels(0, 65535, 1))


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """The first frame of an image file, decoded, in the mode in which it is stored.

    Raises:
        UNREADABLE: Any of these.
    """
    try:
        image = Image.open(file)
        image.load()
    except UNREADABLE:
        raise
    except Exception as e:  # what rare formats have for damaged files: AssertionError, RuntimeError, TypeError ...
        raise OSError(f'{type(e).__name__} {e}'.strip()) from e
    return image


class Decoder:
    """Any image of Pillow to one mode of 8 bits a channel. Images that have that mode stay as they are.

    - Grey of 16 bits: its upper 8 bits, as Pillow itself reads colours of 16 bits. TIFF files say that their levels
      have fewer bits or a sign, which is taken into account.
    - Grey of 32 bits (modes ``I`` and ``F``), where no file says which level is white: 0..1, -1..1, 0..255 or 0..65535,
      the first of them that the image fits, else its own lowest and highest level. To fit, levels may lie beyond the
      ends by an eighth of the range, and are cut off there; and 255 and 65535 need a level of at least a sixteenth of
      them. NaN is black.
    - Transparent parts show `BACKGROUND`, unless the mode keeps transparency.
    - All others (CMYK, YCbCr, LAB, HSV, palettes, 1 bit) as Pillow converts them.

    It warns of what a user should know about the data once, in the first process of a launch or one of its workers.

    Args:
        mode: Mode of Pillow that `usable_modes` has.
        exif_transpose: Turn images upright by their EXIF orientation. Pillow turns TIFF files by itself.
    """

    def __init__(self, mode: str = 'RGB', exif_transpose: bool = False):
        self.mode = mode
        self.exif_transpose = exif_transpose
        self._keys_of_interest = _EXIF_KEYS | {'transparency'}
        self._to_warn_of = {topic: multiprocessing.Semaphore(1) for topic in ('orientation', 'levels')}

    def __repr__(self) -> str:
        return f'{self.mode} upright' if self.exif_transpose else self.mode

    def __call__(
            self,
            image: Image.Image,
            name: Callable[[], str],
            size: tuple[int, int] | None = None,
    ) -> Image.Image:
        """Convert an image.

        Args:
            image: From `open_image`, or as a data set gives it.
            name: Gives the image's name for messages.
            size: Width and height by the annotations. Where they fit the image either as stored or upright, and not
                both, they decide whether it is turned.
        """
        info = image.info
        if image.mode == self.mode and (not info or info.keys().isdisjoint(self._keys_of_interest)):
            return image
        orientation = _orientation(image)
        if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
            image = self._grey(image, name)
        image = _convert(image, self.mode)
        if orientation in _TURNS and self._turns(image.size, orientation, name, size):
            return image.transpose(_TURNS[orientation])
        return image

    def _grey(self, image: Image.Image, name: Callable[[], str]) -> Image.Image:
        values = np.asarray(image)
        levels = _known_levels(image)
        if levels is None:
            levels = low, high, _ = _fitting_levels(values)
            self._warn_once('levels', lambda: (
                f'image {name()} has grey levels of 32 bits (mode {image.mode}), read as {low:g} (black) to {high:g} '
                f'(white), others by their own levels; save them with 8 or 16 bits to have it the same everywhere'))
        grey = Image.fromarray(_to_bytes(values, *levels))
        if (clear := image.info.get('transparency')) is not None:  # one level of a PNG file
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey

    def _turns(
            self, stored: tuple[int, int], orientation: int, name: Callable[[], str], size: tuple[int, int] | None,
    ) -> bool:
        upright = _upright(stored, orientation)
        if stored != upright and size in (stored, upright):
            return size == upright
        if not self.exif_transpose:
            self._warn_once('orientation', lambda: (
                f'image {name()} has EXIF orientation {orientation} and is used as it is stored, as others may be; '
                f'--exif-transpose turns images upright'))
        return self.exif_transpose

    def _warn_once(self, topic: str, text: Callable[[], str]) -> None:
        if int(os.environ.get('RANK') or 0) == 0 and self._to_warn_of[topic].acquire(block=False):
            _logger.warning(text())


def decoded_size(image: Image.Image, exif_transpose: bool) -> tuple[int, int]:
    """Width and height of an opened image after a `Decoder` without ``size``; the pixels are not decoded for it."""
    return _upright(image.size, _orientation(image)) if exif_transpose else image.size


def usable_modes() -> dict[str, int]:
    """Modes of Pillow that a model can take, and their channels: 8 bits each, and no numbers of a palette."""
    usable = {}
    for mode in dict.fromkeys((*Image.MODES, 'LA')):  # which Pillow 10 has, and does not list
        described = ImageMode.getmode(mode)
        if described.typestr != '|u1' or 'P' in described.bands:
            continue
        try:
            _convert(Image.new('L', (1, 1)), mode)
        except (ValueError, KeyError):
            continue
        usable[mode] = len(described.bands)
    return usable


def _convert(image: Image.Image, mode: str) -> Image.Image:
    keeps = mode[-1] in 'Aa'
    if image.mode in _STRAIGHT and image.mode != mode:
        image = image.convert(_STRAIGHT[image.mode])
    if not keeps and _is_transparent(image):
        image = image.convert('RGBA')
        behind = Image.new('RGB', image.size, BACKGROUND)
        behind.paste(image, mask=image)
        image = behind
    if image.mode == mode:
        return image
    try:
        return image.convert(mode)
    except ValueError:  # for instance LAB to L, which Pillow does not do in one step
        return image.convert('RGB').convert(mode)


def _is_transparent(image: Image.Image) -> bool:
    # not Image.has_transparency_data, which fails on the palettes that damaged files lack
    palette = image.palette.mode if image.mode == 'P' and image.palette else ''
    return 'transparency' in image.info or (image.mode + palette)[-1] in 'Aa'


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 where it has none that can be read."""
    if image.info.keys().isdisjoint(_EXIF_KEYS):
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged, in one of many ways; the pixels are good
        return 1


def _upright(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    return stored[::-1] if orientation in _TURNS and orientation >= 5 else stored


# ---- levels -----------------------------------------------------------------------------------------------------


def _known_levels(image: Image.Image) -> Levels | None:
    """The grey levels that a file of this format can have; None where the format does not say."""
    tags = getattr(image, 'tag_v2', {})
    usual = 16 if image.mode.startswith('I;16') or image.format in ('PNG', 'PPM') else 32
    bits = tags.get(_BITS, (usual,))[0]
    if bits > 16:
        return None
    if tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED:
        return Levels(-2 ** (bits - 1), 2 ** (bits - 1) - 1, 1)
    return Levels(0, 2 ** bits - 1, 1)


def _fitting_levels(values: np.ndarray) -> Levels:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return _RANGES[0]
    lowest, highest = float(finite.min()), float(finite.max())
    for levels in _RANGES:
        beyond = (levels.high - levels.low) / 8
        bright = not levels.step or highest >= levels.high / 16
        if bright and levels.low - beyond <= lowest and highest <= levels.high + beyond:
            return levels
    return Levels(lowest, highest)


def _to_bytes(values: np.ndarray, low: float, high: float, step: int) -> np.ndarray:
    """256 steps of equal width from low to high, so that 16 bits become the upper 8 of them."""
    numbers = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    numbers = np.nan_to_num(numbers, copy=False, nan=low, posinf=high, neginf=low)
    numbers = (numbers - low) * (256 / ((high - low + step) or 1))
    return numbers.clip(0, 255).astype(np.uint8)
