"""Whether files that came from the Hub are what was uploaded.

huggingface_hub compares the length of a download only, and hf_xet not even its own hash: a changed byte is written to
the disk without an error. But the Hub tells a checksum of every file, which huggingface_hub keeps.
"""
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from timm.models import get_pretrained_cfg, parse_model_name

from timm_spinal.errors import UserError
from timm_spinal.files import sha256
from timm_spinal.models._timm import (
    HF_WEIGHTS_NAME,
    PREFERRED_FILES,
    get_safe_alternatives,
    hf_split,
    resolve_pretrained_source,
)

_CHECKSUM = re.compile('[0-9a-f]{40}|[0-9a-f]{64}')  # git's SHA-1 of small files, SHA-256 of large ones


def check_download(what: str, source: str | dict[str, Any], cache_dir: str | None = None) -> None:
    """Refuse weights from the Hub that are not what was uploaded.

    Args:
        what: What they are of, for the message.
        source: The model's name, or its ``pretrained_cfg``.
        cache_dir: Where timm keeps downloads, if that is not huggingface_hub's cache.

    Raises:
        UserError: Names the file.
    """
    cfg = _named_cfg(source) if isinstance(source, str) else source
    for path in weight_files(cfg, cache_dir):
        if is_damaged(path):
            part = f'{constants.CONFIG_NAME} is' if path.name == constants.CONFIG_NAME else 'weights are'
            raise UserError(f'{what}: its {part} damaged (another checksum than on the Hub); delete {path.resolve()} '
                            'and try again')


def is_damaged(path: Path) -> bool:
    """Whether a file is known to be another one than on the Hub; a file without a known checksum is not."""
    expected = checksum_on_hub(path)
    if expected is None:
        return False
    return expected != (sha256(path) if len(expected) == 64 else git_sha1(path))


def checksum_on_hub(path: Path) -> str | None:
    """The checksum that the Hub told of a file in huggingface_hub's cache, or in a folder that it downloaded into.

    In the cache, a file of a commit is a link to one named by its checksum. That may be a link in its turn, into a
    store that all repositories share, where names are hashes of another kind. Where there are no links, the Hub is
    asked.

    Returns:
        SHA-256, or git's SHA-1 for small files; None where it is not known: the file is not from the Hub, or was
        changed since, or there are no links and the Hub cannot be asked.
    """
    while True:
        if path.parent.name == 'blobs' and _CHECKSUM.fullmatch(path.name):
            return path.name
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return _in_folder(path) or _asked(path)


def _asked(path: Path) -> str | None:
    """The checksum of a file that lies in a commit's folder of the cache itself, from the Hub."""
    match = re.search(r'/models--([^/]+)/snapshots/([0-9a-f]{40})/(.+)$', path.absolute().as_posix())
    if not match:
        return None
    url = hf_hub_url(match[1].replace('--', '/'), match[3], revision=match[2])
    try:
        etag = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).etag or ''
    except Exception:  # offline, or the Hub has a fault: then nothing can be said of the file
        return None
    return etag if _CHECKSUM.fullmatch(etag) else None


def _in_folder(path: Path) -> str | None:
    """The checksum of a file that was downloaded into a folder, from what huggingface_hub wrote down beside it."""
    for folder in path.absolute().parents:
        written = folder / '.cache/huggingface/download' / f'{path.absolute().relative_to(folder)}.metadata'
        try:
            _, etag, time = written.read_text(encoding='utf-8').split()
            as_it_came = path.stat().st_mtime <= float(time) + 1  # huggingface_hub's own rule
        except (OSError, ValueError):
            continue
        return etag if as_it_came and _CHECKSUM.fullmatch(etag) else None
    return None


def git_sha1(path: Path) -> str:
    """The id that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def _named_cfg(name: str) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a model that is not made yet, as far as it says where the weights are."""
    source, name = parse_model_name(name)
    if source:
        return dict(source=source, hf_hub_id=name, file=name)
    cfg = get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def weight_files(cfg: dict[str, Any], cache_dir: str | None) -> list[Path]:
    """The files that timm reads for a model, of those that are on this disk: the config, if any, and the weights."""
    source, where = resolve_pretrained_source(cfg)
    if source == 'file':
        return [Path(where)]
    if source == 'local-dir':
        here = [Path(where) / name for name in (constants.CONFIG_NAME, *PREFERRED_FILES)]
        return _config_and_first([path for path in here if path.is_file()])
    if source != 'hf-hub':
        return []
    repo, name = where if isinstance(where, (list, tuple)) else (where, HF_WEIGHTS_NAME)
    try:
        repo, revision = hf_split(repo)
        cached = [try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
                  for file in (constants.CONFIG_NAME, *get_safe_alternatives(name), name)]
    except (HFValidationError, AssertionError):  # no such name can be in the cache
        return []
    return _config_and_first([Path(path) for path in cached if isinstance(path, str)])


def _config_and_first(paths: list[Path]) -> list[Path]:
    """Of a config and several forms of the weights, the config and the form that timm prefers."""
    configs = [path for path in paths if path.name == constants.CONFIG_NAME]
    return configs + [path for path in paths if path.name != constants.CONFIG_NAME][:1]
