"""Values as annotation files hold them: numbers as text, ids of two kinds, names with blanks, any encoding.

A value that can mean one thing only is read; any other raises a `UserError` that names the file, the item and the fix.
"""
import codecs
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from timm_spinal.errors import UserError

# what programs call by the name of a code page and write in the larger one that grew out of it
LARGER = {'gb2312': 'gb18030', 'gbk': 'gb18030', 'shift_jis': 'cp932', 'euc_kr': 'cp949', 'big5': 'cp950'}
NO, YES = ('', '0', 'false', 'no', 'none', 'null', 'unspecified'), ('1', 'true', 'yes')

Corners = tuple[float, float, float, float]


def number(value: Any) -> float:
    """A number, or a number as text.

    Raises:
        ValueError: It is neither, or is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f'{value!r} is not a number')
    try:
        result = float(value)
    except OverflowError as e:
        raise ValueError('not finite') from e
    if not math.isfinite(result):
        raise ValueError('not finite')
    return result


def four_numbers(values: Any, where: str) -> Corners:
    """Four finite numbers: a list, a list in a list, or a text such as ``[1, 2, 3, 4]`` or ``1 2 3 4``.

    Raises:
        UserError: They are not; ``where`` names the annotation.
    """
    found = values
    if isinstance(found, str):
        found = re.split(r'[\s,;]+', found.strip().strip('[]()').strip())
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]
    try:
        a, b, c, d = (number(value) for value in found)
    except (TypeError, ValueError) as e:
        if str(e) == 'not finite':
            raise UserError(f'{where}: its box {short(values)} is not finite; correct it') from e
        raise UserError(f'{where}: its box is {short(values)}, not four numbers; correct it') from e
    return a, b, c, d


def around(outline: Any, where: str) -> Corners:
    """Smallest box, x1, y1, x2, y2, around polygons: x, y, x, y, ... in lists of any depth.

    Raises:
        UserError: They are not at least two points of finite numbers.
    """
    try:
        flat = [number(value) for value in _flat(outline)]
    except ValueError as e:
        raise UserError(f'{where}: its outline contains something that is not a finite number ({e}); correct it') from e
    xs, ys = flat[0::2], flat[1::2]
    if len(flat) < 4 or len(xs) != len(ys):
        raise UserError(f'{where}: its outline has {len(flat)} numbers, not x and y of at least two points; correct it')
    return min(xs), min(ys), max(xs), max(ys)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def identity(value: Any, where: str, what: str = 'id') -> int | float | str:
    """An id; 1, 1.0, ``"1"`` and ``"1.0"`` are the same.

    Raises:
        UserError: It is neither a finite number nor a text.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, str) and (text := value.strip()):
        whole = re.fullmatch(r'(-?(?:0|[1-9]\d{0,99}))(?:\.0+)?', text, re.ASCII)
        return int(whole[1]) if whole else text
    raise UserError(f'{where}: its {what} is {short(value)}, neither a number nor a text; correct it')


def class_name(value: Any, where: str) -> str:
    """The name of a class, without blanks around it, one blank between words and in Unicode's composed form.

    Raises:
        UserError: It is empty, or no text.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and (name := ' '.join(unicodedata.normalize('NFC', value).split())):
        return name
    raise UserError(f'{where}: its name is {short(value)}, but a class needs a name; correct it')


def flag(value: Any, where: str, what: str) -> bool:
    """Yes or no, as a boolean, number or text; None is no.

    Raises:
        UserError: It is none of these.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    text = str(value).strip().lower()
    if text in NO or text in YES:
        return text in YES
    try:
        return number(value) != 0
    except ValueError as e:
        raise UserError(f'{where}: its {what} is {short(value)}, neither 0 nor 1; correct it') from e


def side(value: Any) -> int:
    """Width or height in pixels; 0 where it is no whole number above 0, so that it is not known."""
    try:
        pixels = number(value)
    except ValueError:
        return 0
    return int(pixels) if pixels > 0 and pixels.is_integer() else 0


def short(value: Any) -> str:
    """A value as JSON writes it, cut to 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def read_lines(path: Path) -> list[str]:
    """The lines of a text without blanks around them and without empty ones, in UTF-8 or as the byte order mark says.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode(json.detect_encoding(raw))
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read as text ({e}); save it as UTF-8') from e
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file, in UTF-8 or as the byte order mark says.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as e:
        raise UserError(f'{path}: cannot be read as JSON ({e}); save it as UTF-8') from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path}: cannot be read as JSON ({" ".join(str(e).split())}); correct it') from e


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file in any encoding that Python knows; names are without namespaces.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        root = ElementTree.fromstring(_decode_xml(path.read_bytes()))
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}; every image of the split needs its annotations') from e
    except UnicodeError as e:
        raise UserError(f'{path}: is not in the encoding that its first line names, UTF-8 if none ({e}); name the '
                        'right one there') from e
    except LookupError as e:
        raise UserError(f'{path}: its first line names an encoding that is not known ({e}); name the right one') from e
    except (ElementTree.ParseError, ValueError) as e:
        raise UserError(f'{path}: cannot be read as XML ({e}); correct it') from e
    for element in root.iter():
        element.tag = element.tag.rpartition('}')[2]
    return root


def _decode_xml(raw: bytes) -> str:
    """The text of an XML file; expat itself knows no encoding of several bytes but Unicode's."""
    encoding: str = json.detect_encoding(raw)  # by byte order mark and zero bytes, which no declaration outweighs
    declared = re.match(rb'\s*<\?xml[^>]*?\sencoding\s*=\s*["\']([\w.:-]+)', raw)
    if encoding == 'utf-8' and declared:
        known = codecs.lookup(declared[1].decode()).name
        # .NET writes encoding="utf-16" into files that it saves in UTF-8
        if not known.startswith(('utf-16', 'utf-32')):
            encoding = LARGER.get(known, known)
    return raw.decode(encoding).lstrip()
