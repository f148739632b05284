"""Writing files so that a kill or a full disk at any instant leaves the old ones whole."""
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Callable

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


def read_json(path: Path) -> Any:
    """The keys and values of a JSON file, or None where there is none.

    Raises:
        UserError: The file is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read ({" ".join(str(e).split())}); remove it and run again') from e
    if not isinstance(value, dict):
        raise UserError(f'{path}: holds {value!r:.20} and no keys; remove it and run again')
    return value


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
        raise UserError(f'{what} {path}: not valid YAML ({" ".join(str(e).split())}); mend the file') from e
    except RecursionError as e:
        raise UserError(f'{what} {path}: is nested too deeply; write plain lines like "epochs: 3"') from e
    if raw is not None and not isinstance(raw, dict):
        raise UserError(f'{what} {path}: holds a {type(raw).__name__}, no keys; {fix}')
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
