"""What goes wrong between here and the Hub, in one line."""
import errno
import hashlib
import re
from pathlib import Path
from typing import Iterator

from huggingface_hub import get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from .files import sha256

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# huggingface_hub's HTTP client is another one from version to version; these names are in all of them
_TRANSPORT = {'TransportError', 'RequestException', 'ConnectionError'}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_transport(error: BaseException) -> bool:
    """Whether the connection failed, before there was an answer."""
    offline = isinstance(error, OfflineModeIsEnabled)  # that is no fault of the connection
    return not offline and any(cls.__name__ in _TRANSPORT for cls in type(error).__mro__)


def explain(error: BaseException) -> str | None:
    """Reason and remedy for an error of huggingface_hub or of reading what it fetched; None for other errors.

    No token is ever in it.
    """
    for cause in chain(error):
        if isinstance(cause, HfHubHTTPError):
            return _of_answer(cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set and the cache does not hold it; unset it, or fetch it once while online'
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return f'cannot be written ({cause.strerror}); make room, or set HF_HOME to another disk'
        if isinstance(cause, OSError) and 'Consistency check failed' in str(cause):
            return 'came incomplete; try again'
        if isinstance(cause, SafetensorError):
            return f'its weights are damaged ({one_line(cause)}); delete it from the cache and try again'
        if isinstance(cause, HFValidationError):
            return "is no valid repository name; write it as owner/name, with letters, digits, '-', '_' and '.'"
        if is_transport(cause):
            return f'the Hub cannot be reached ({one_line(cause)}); check the network'
        if isinstance(cause, FileMetadataError):
            return f'HF_ENDPOINT does not answer as a Hub does ({one_line(cause)})'
    if isinstance(error, LocalEntryNotFoundError):
        return 'is not in the cache, and the Hub cannot be reached; check the network'
    if isinstance(error, EntryNotFoundError):
        return f'holds no such file ({one_line(error)})'
    return None


def _of_answer(error: HfHubHTTPError) -> str:
    """The same for an answer of the Hub with an error code."""
    status = error.response.status_code
    said = one_line(error.server_message or '') or f'status {status}'
    if isinstance(error, GatedRepoError):
        return f'access to it is restricted ({said}); ask for it on its page, then {LOG_IN}'
    if isinstance(error, RepositoryNotFoundError):
        may = 'or it is private and your token may not read it; check the name' if get_token() else \
            f'or it is private: {LOG_IN}'
        return f'there is no such repository on the Hub, {may}'
    if isinstance(error, RevisionNotFoundError):
        return 'it has no such branch, tag or commit; check what follows the @'
    if isinstance(error, EntryNotFoundError):
        name = re.search(r'/resolve/[^/]+/(\S+)', str(error.response.url))
        return f'holds no {name[1] if name else "such file"}, so it is no model that timm loads'
    if status == 401:
        return f'the token is not valid ({said}); {LOG_IN}'
    if status == 403:
        return f'the token may not do this ({said}); make one with write permission on hf.co/settings/tokens'
    if status == 412:
        return 'somebody else has changed it in the meantime; try again'
    if status == 429:
        return 'the Hub has had too many requests from you; try again later'
    if status >= 500:
        return f'the Hub has a fault ({said}); try again later'
    return f'the Hub refuses it ({said})'


def one_line(error: object, most: int = 200) -> str:
    """The text of an error without line breaks."""
    return ' '.join(str(error).split())[:most]


def is_damaged(path: Path) -> bool:
    """Whether a file in huggingface_hub's cache is not what was uploaded.

    huggingface_hub compares the length of a download only; but it names its files by their checksums: large ones by
    SHA-256, small ones by git's SHA-1.
    """
    name = path.resolve().name
    if re.fullmatch('[0-9a-f]{64}', name):
        return sha256(path) != name
    return re.fullmatch('[0-9a-f]{40}', name) is not None and git_sha1(path) != name


def git_sha1(path: Path) -> str:
    """The id that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def damaged_file(repo: str, names: tuple[str, ...] = ('model.safetensors', 'config.json')) -> Path | None:
    """A damaged file of a repository in the cache, or None.

    Args:
        repo: ``owner/name`` or ``owner/name@revision``.
        names: Files to look at, if they are there.
    """
    name, _, revision = repo.partition('@')
    for file in names:
        found = try_to_load_from_cache(name, file, revision=revision or None)
        if isinstance(found, str) and is_damaged(Path(found)):
            return Path(found).resolve()
    return None
