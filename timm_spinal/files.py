"""Files of a run: written so that a kill or a full disk leaves the old ones whole, and checked when they are read."""
import contextlib
import csv
import hashlib
import json
import os
import re
import types
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, Mapping, TextIO, Union, get_args, get_origin

import yaml

from timm_spinal.errors import UserError

# torch and safetensors raise their own types for what the operating system refuses
_WRITE_ERRORS = ('PytorchStreamWriter', 'inline_container', 'os error', 'I/O error')


def write_atomically(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Raises:
        UserError: The disk is full, or the file cannot be written for another reason; the old file is kept.
    """
    path = Path(path)
    temp = path.with_name(f'.{path.name}.tmp')
    try:
        write(temp)
        fsync(temp)
        os.replace(temp, path)
        fsync(path.parent)
    except Exception as e:
        temp.unlink(missing_ok=True)
        if (reason := write_error(e)) is None:
            raise
        raise UserError(f'cannot write {path}: {reason}; the file that was there before is kept') from e


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A text file to write row by row, which takes the place of ``path`` at the end, and is gone where that fails.

    Raises:
        UserError: The disk is full, or the file cannot be written for another reason; the old file is kept.
    """
    temp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temp, 'w', newline='', encoding='utf-8', errors='backslashreplace') as f:
            yield f
        os.replace(temp, path)
    except OSError as e:
        raise UserError(f'cannot write {path}: {write_error(e)}; the file that was there before is kept') from e
    finally:
        temp.unlink(missing_ok=True)


def safe_cell(value: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple('=+-@\t\r\n')) else value


def write_error(error: Exception) -> str | None:
    """Why the operating system refused to write, or None when an error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = ' '.join(str(error).split())
    if any(mark in text for mark in _WRITE_ERRORS):
        return f'is the disk full? ({text[:100]})'
    return None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    text = json.dumps(value, indent=2) + '\n'
    write_atomically(path, lambda temp: temp.write_text(text, encoding='utf-8'))


def read_json(path: Path, kinds: Mapping[str, Any] | None = None, fix: str = 'remove it and run again') -> Any:
    """The keys and values of a JSON file, or None where there is none.

    Args:
        path: The file.
        kinds: Types of the keys that the file may have, such as ``list[int]``; see `wrong_type`. It may have others.
        fix: What to do with a damaged file, for the message.

    Raises:
        UserError: The file is damaged, holds something else, or has a value of another type.
    """
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path}: cannot be read ({" ".join(str(e).split())}); {fix}') from e
    if not isinstance(value, dict):
        raise UserError(f'{path}: it contains {value!r:.20} instead of keys; {fix}')
    if wrong := wrong_type(value, kinds or {}):
        raise UserError(f'{path}: {wrong}; {fix}')
    return value


def wrong_type(value: Mapping[str, Any], kinds: Mapping[str, Any]) -> str | None:
    """What is wrong with the types of some keys and values, None if nothing is.

    Args:
        value: As a JSON file has them.
        kinds: As for `read_json`; the type of a mapping is a dict of the types of its keys.
    """
    for key, kind in kinds.items():
        if key in value:
            if isinstance(kind, dict) and isinstance(value[key], dict):
                if wrong := wrong_type(value[key], kind):
                    return wrong
            elif not is_of_type(value[key], dict if isinstance(kind, dict) else kind):
                return f'{key} is {value[key]!r:.40}, which is not what belongs there'
    return None


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a type such as ``float``, ``list[int]`` or ``dict[str, Any] | None``."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(is_of_type(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of_type(item, args[1]) for item in value.values())
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def read_table(
        path: Path,
        columns: Collection[str],
        texts: Collection[str] = (),
        fix: str = 'remove it and run again',
) -> list[dict[str, Any]]:
    """Rows of a CSV file with a header, each a number by column; empty cells are left out.

    Args:
        path: The file.
        columns: Columns that it must have, without empty cells where they are numbers; it may have others.
        texts: Columns whose cells are texts, and stay also where they are empty.
        fix: What to do with a damaged file, for the message.

    Raises:
        UserError: It is no such file.
    """
    try:
        with open(path, newline='', encoding='utf-8') as f:
            header, *lines = list(csv.reader(f, strict=True)) or [[]]
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f'no column {missing[0]}')
        if ragged := [i for i, line in enumerate(lines, 2) if len(line) != len(header)]:
            raise ValueError(f'line {ragged[0]} has other columns than the first one')
        return [{k: v if k in texts else float(v) for k, v in zip(header, line) if v or k in texts or k in columns}
                for line in lines]
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f'{path}: cannot be read as a table ({getattr(e, "strerror", None) or e}); {fix}') from e


class _YamlLoader(yaml.SafeLoader):
    """YAML without the surprises of its version 1.1: a key twice is an error; 1:30, 010, yes, no and dates are texts.

    Texts that mean a number or a truth value are converted where an option wants one.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key {key.value!r} is there twice', key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(':')[2] in ('null', 'merge')]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _first in (  # each a part of what YAML 1.1 takes, so that what PyYAML writes reads back equal
    ('bool', r'true|True|TRUE|false|False|FALSE', 'tTfF'),
    ('int', r'[-+]?(0|[1-9][0-9]{0,17})', '-+0123456789'),
    ('float', r'[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)', '-+.0123456789'),
):
    _YamlLoader.add_implicit_resolver(f'tag:yaml.org,2002:{_kind}', re.compile(f'({_pattern})$'), list(_first))


def read_yaml(path: str | Path, what: str, fix: str, place: Path | None = None) -> dict[Any, Any]:
    """The keys of a YAML file; an empty file has none.

    Args:
        path: The file, by the name that the user gave it.
        what: What it is, for messages: ``config`` or ``sweep``.
        fix: What to do where it does not exist or holds no keys.
        place: Where it lies, if that is not ``path``.

    Raises:
        UserError: No such file, no YAML, a key that is there twice, or no keys.
    """
    try:
        raw = yaml.load(Path(place or path).read_text(encoding='utf-8-sig'), _YamlLoader)
    except (OSError, ValueError) as e:  # ValueError: no UTF-8, or a null byte in the name
        reason = getattr(e, 'strerror', None) or ' '.join(str(e).split())
        raise UserError(f'{what} {path}: {reason}; {fix}') from e
    except yaml.YAMLError as e:
        raise UserError(f'{what} {path}: not valid YAML ({" ".join(str(e).split())}); correct the file') from e
    except RecursionError as e:
        raise UserError(f'{what} {path}: it is nested too deeply; write plain lines like "epochs: 3"') from e
    if raw is not None and not isinstance(raw, dict):
        raise UserError(f'{what} {path}: it contains a {type(raw).__name__} instead of keys; {fix}')
    return raw or {}


def fsync(path: str | os.PathLike) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | os.PathLike) -> str:
    """Checksum of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
