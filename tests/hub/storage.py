"""The test Hub's answers as Xet's storage: tokens, xorbs and shards sent to it, and where the chunks of a file are.

All hashes are taken from the client, but the SHA-256 of every file is checked.
"""
import json
import re
import secrets
import time
from typing import Any, NamedTuple

from .downloads import ranged
from .server import Reply, Request, TestHub, json_reply
from .store import HubError
from .xet import FormatError, Term, Xorb, parse_shard, read_xorb

LIFETIME = 3600  # seconds that a token holds


def xet_token(hub: TestHub, request: Request, name: str, kind: str, revision: str) -> Reply:
    """In both forms: huggingface_hub reads the headers, hf_xet the body."""
    repo = hub.store.repo(name, request.user)
    if kind == 'write' and not (request.query.get('create_pr') == '1' and request.user is not None):
        hub.store.check_write(name, request.user)
    if kind == 'read':
        repo.resolve(revision)
    token, end, url = f'xet_{kind}_{secrets.token_hex(8)}', int(time.time()) + LIFETIME, f'{hub.cdn}/cas'
    hub.store.xet_tokens[token] = kind
    reply = json_reply(dict(casUrl=url, accessToken=token, exp=end))
    return reply._replace(headers={**reply.headers, 'X-Xet-Cas-Url': url, 'X-Xet-Access-Token': token,
                                   'X-Xet-Token-Expiration': str(end)})


def _check_token(hub: TestHub, request: Request, *kinds: str) -> None:
    """Only tokens of the storage are taken, never those of the Hub."""
    kind = hub.store.xet_tokens.get(request.headers.get('Authorization', '').removeprefix('Bearer '))
    if kind is None:
        raise HubError(401, 'no token of the storage')
    if kind not in kinds:
        raise HubError(403, f'the token may only {kind}')


# ---- uploads ----------------------------------------------------------------------------------------------------


def chunk(hub: TestHub, request: Request, hash: str) -> Reply:
    """No chunk is known beforehand."""
    _check_token(hub, request, 'read', 'write')
    raise HubError(404, 'unknown chunk')


def xorb(hub: TestHub, request: Request, hash: str) -> Reply:
    _check_token(hub, request, 'write')
    try:
        found = read_xorb(request.body)
    except FormatError as e:
        raise HubError(400, str(e)) from e
    new = hub.store.xorbs.setdefault(hash, found) is found
    return json_reply(dict(was_inserted=new))


def shard_v1(hub: TestHub, request: Request) -> Reply:
    _check_token(hub, request, 'write')
    try:
        for file in parse_shard(request.body):
            hub.store.add_file(file)
    except FormatError as e:
        raise HubError(400, str(e)) from e
    return json_reply(dict(result=1))


def shard_v2(hub: TestHub, request: Request) -> Reply:
    """As `shard_v1`, with a line on the progress before the result."""
    shard_v1(hub, request)
    lines: list[dict[str, Any]] = [dict(type='validating', verified=0, total=1), dict(type='result', result=1)]
    body = ''.join(json.dumps(line) + '\n' for line in lines).encode()
    return Reply(200, body, {'Content-Type': 'application/x-ndjson'})


# ---- downloads --------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Chunks of a xorb that a client shall fetch; the bytes are those of the xorb, the last one included."""
    xorb: str
    chunks: dict[str, int]
    bytes: dict[str, int]
    size: int


def _pieces(hub: TestHub, request: Request, hash: str) -> tuple[int, list[Piece]]:
    """Bytes to skip at the beginning, and the chunks with the wanted range of a file."""
    _check_token(hub, request, 'read', 'write')
    if hash not in hub.store.files:
        raise HubError(404, 'unknown file')
    terms = hub.store.files[hash]
    total = sum(term.size for term in terms)
    wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', request.headers.get('Range', ''))
    first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, total - 1)
    if first >= total:
        raise HubError(416, 'Range Not Satisfiable')
    pieces, skip, position = [], 0, 0
    for term in terms:
        piece, before = _piece(hub.store.xorbs[term.xorb], term, first - position, last - position)
        if piece is not None:
            skip = skip if pieces else first - position - before
            pieces.append(piece)
        position += term.size
    return skip, pieces


def _piece(found: Xorb, term: Term, first: int, last: int) -> tuple[Piece | None, int]:
    """The chunks of a term that hold its bytes from first to last, and how many bytes of it lie before them."""
    inside, position = [], 0
    for index in range(term.first, term.end):
        if position <= last and position + found.chunks[index].size > first:
            inside.append((index, position))
        position += found.chunks[index].size
    if not inside:
        return None, 0
    (start, before), end = inside[0], inside[-1][0] + 1
    chunks = found.chunks[start:end]
    span = dict(start=chunks[0].start, end=chunks[-1].end - 1)
    return Piece(term.xorb, dict(start=start, end=end), span, sum(c.size for c in chunks)), before


def _terms(pieces: list[Piece]) -> list[dict[str, Any]]:
    return [dict(hash=p.xorb, unpacked_length=p.size, range=p.chunks) for p in pieces]


def reconstruction_v1(hub: TestHub, request: Request, hash: str) -> Reply:
    skip, pieces = _pieces(hub, request, hash)
    fetch: dict[str, list[Any]] = {}
    for p in pieces:
        fetch.setdefault(p.xorb, []).append(dict(range=p.chunks, url=f'{hub.cdn}/xorbs/{p.xorb}', url_range=p.bytes))
    return json_reply(dict(offset_into_first_range=skip, terms=_terms(pieces), fetch_info=fetch))


def reconstruction_v2(hub: TestHub, request: Request, hash: str) -> Reply:
    skip, pieces = _pieces(hub, request, hash)
    xorbs: dict[str, list[Any]] = {}
    for p in pieces:
        ranges = [dict(chunks=p.chunks, bytes=p.bytes)]
        xorbs.setdefault(p.xorb, []).append(dict(url=f'{hub.cdn}/xorbs/{p.xorb}', ranges=ranges))
    return json_reply(dict(offset_into_first_range=skip, terms=_terms(pieces), xorbs=xorbs))


def xorb_data(hub: TestHub, request: Request, hash: str) -> Reply:
    """Bytes of a xorb, on the host of large files; whoever has the address may read it."""
    return ranged(request, hub.store.xorbs[hash].body, {})
