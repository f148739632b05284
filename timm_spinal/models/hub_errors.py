"""Errors of the Hugging Face Hub, and of the network before it, explained in one line."""
import errno
import os
import re
from typing import Any, Iterator, NamedTuple

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# huggingface_hub's HTTP client is another one from version to version; these names are in all of them
_TRANSPORT = {'TransportError', 'RequestException', 'ConnectionError'}
# hf_xet raises RuntimeError and ConnectionError for whatever happens, and says in words what it was
# (the last two forms: with huggingface_hub 1.18, which gets a new token for it, of an error of huggingface_hub's own)
_XET_STATUS = re.compile(r"""(?:HTTP status \w+ error \(|(?:Client|Server) error '|HTTPError\(["'])(\d{3}) """)
# the second: huggingface_hub 1.18 closes its HTTP client when a connection fails, and tries again with the closed one
_NO_ANSWER = ('error sending request', 'the client has been closed')
_XET_UNREADABLE = ('error decoding response body', 'Malformed data', 'Format error', 'Invalid response')
_XET_WHERE = re.compile(r'^(?:[A-Z][\w/ ]*: )+')  # which of its parts say that
_XET_SYSTEM = re.compile(r'\(os error (\d+)\)')


class Answer(NamedTuple):
    """A server's answer that was no success; ``by_xet`` when hf_xet had it, which asks again by itself."""
    status: int
    said: str
    url: str
    by_xet: bool

    @property
    def of_storage(self) -> bool:
        """Whether it is not from the Hub but from where large files lie."""
        return bool(self.url) and not self.url.startswith((f'{constants.ENDPOINT}/', constants.HUGGINGFACE_CO_URL_HOME))

    @property
    def line(self) -> str:
        return f'status {self.status}' + (f': {self.said}' if self.said else '')


def answer_of(error: BaseException) -> Answer | None:
    """The answer that an error is about; None when it is about something else."""
    response: Any = getattr(error, 'response', None)
    if getattr(response, 'status_code', None) is not None:
        said = re.sub('<[^>]*>', ' ', getattr(error, 'server_message', None) or '')  # a storage answers in XML
        return Answer(response.status_code, one_line(said), str(response.url), by_xet=False)
    text = xet_text(error)
    if match := _XET_STATUS.search(text):
        url = re.search(r'''https?://[^\s)'"]+''', text)
        return Answer(int(match[1]), '', url[0] if url else '', by_xet=True)
    return None


def xet_text(error: BaseException) -> str:
    """What hf_xet says; empty for errors that cannot be its own."""
    return str(error) if isinstance(error, (RuntimeError, OSError)) else ''


def _detail(error: BaseException) -> str:
    return one_line(_XET_WHERE.sub('', xet_text(error)) or error)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_transport(error: BaseException) -> bool:
    """Whether the connection failed, before there was an answer."""
    offline = isinstance(error, OfflineModeIsEnabled)  # that is no fault of the connection
    if any(mark in xet_text(error) for mark in _NO_ANSWER):
        return True
    return not offline and any(cls.__name__ in _TRANSPORT for cls in type(error).__mro__)


def explain(error: BaseException) -> str | None:
    """Reason and remedy for an error of huggingface_hub or of reading what it fetched; None for other errors.

    No token is ever in it.
    """
    for cause in chain(error):
        if answer := answer_of(cause):
            return _of_answer(cause, answer)
        if isinstance(cause, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set and the cache does not have it; unset it, or fetch it once while online'
        if full := _disk_full(cause):
            return f'cannot be written ({full}); make room, or set HF_HOME to another disk'
        if any(mark in xet_text(cause) for mark in _XET_UNREADABLE):
            return (f"what came from Xet's storage cannot be read ({_detail(cause)}); the transfer was cut, or a "
                    'proxy answered in its place: try again, or set HF_HUB_DISABLE_XET=1')
        if isinstance(cause, OSError) and 'Consistency check failed' in str(cause):
            return 'came incomplete; try again'
        if isinstance(cause, SafetensorError):
            return f'its weights are damaged ({one_line(cause)}); delete it from the cache and try again'
        if isinstance(cause, HFValidationError):
            return "is not a valid repository name; write it as owner/name, with letters, digits, '-', '_' and '.'"
        if is_transport(cause):
            return f'the Hub cannot be reached ({_detail(cause)}); check the network'
        if isinstance(cause, FileMetadataError) or 'Xet headers' in str(cause):
            return f'HF_ENDPOINT does not answer as a Hub does ({one_line(cause)})'
    if isinstance(error, LocalEntryNotFoundError):
        return 'is not in the cache, and the Hub cannot be reached; check the network'
    if isinstance(error, EntryNotFoundError):
        return f'has no such file ({one_line(error)})'
    return None


def _disk_full(error: BaseException) -> str:
    """The operating system's words when it has no room for a file; empty for other errors."""
    match = _XET_SYSTEM.search(xet_text(error))
    code = int(match[1]) if match else getattr(error, 'errno', None)
    return os.strerror(code) if code in DISK_FULL else ''


def _of_answer(error: BaseException, answer: Answer) -> str:
    """The same for an answer with an error code."""
    status, said = answer.status, answer.said or f'status {answer.status}'
    if isinstance(error, GatedRepoError):
        return f'access to it is restricted ({said}); ask for it on its page, then {LOG_IN}'
    if isinstance(error, RepositoryNotFoundError) or ('-token/' in answer.url and status == 404 and answer.by_xet):
        may = 'or it is private and your token may not read it; check the name' if get_token() else \
            f'or it is private: {LOG_IN}'
        return f'there is no such repository on the Hub, {may}'
    if isinstance(error, RevisionNotFoundError):
        return 'it has no such branch, tag or commit; check what follows the @'
    if isinstance(error, EntryNotFoundError):
        name = re.search(r'/resolve/[^/]+/(\S+)', answer.url)
        return f'has no {name[1] if name else "such file"}, so timm cannot load it as a model'
    if status == 401 and not answer.of_storage:
        return f'the token is not valid ({said}); {LOG_IN}'
    if status == 403 and not answer.of_storage:
        right = 'read' if re.search('/resolve/|/xet-read-token/', answer.url) else 'write'
        return f'the token may not do this ({said}); make one with {right} permission on hf.co/settings/tokens'
    if status == 412:
        return 'somebody else has changed it in the meantime; try again'
    where = 'the storage of large files' if answer.of_storage else 'the Hub'
    if status == 429:
        return f'{where} has had too many requests from you ({answer.line}); try again later'
    if status >= 500:
        return f'{where} has a fault ({answer.line}); try again later'
    if status in (401, 403):  # its tokens and links hold for some minutes
        return f'{where} refuses it ({answer.line}); what allowed it may have expired: try again'
    if status == 404:
        return f'{where} does not have it ({answer.line}); try again later'
    return f'{where} refuses it ({answer.line})'


def one_line(error: object, most: int = 200) -> str:
    """The text of an error without line breaks, and without the query of an address, which may hold a signature."""
    return re.sub(r'(https?://[^\s?]+)\?[^\s)]*', r'\1', ' '.join(str(error).split()))[:most]
