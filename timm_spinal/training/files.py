"""Writing files so that a kill or a full disk at any instant leaves the old ones whole."""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable

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
    """A JSON file, or None where there is none.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read ({" ".join(str(e).split())}); remove it and run again') from e


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
