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


def _terms(hub: TestHub, request: Request, hash: str) -> tuple[int, list[Term]]:
    """Bytes to skip at the beginning, and the chunks with the wanted range of a file."""
    _check_token(hub, request, 'read', 'write')
    if hash not in hub.store.files:
        raise HubError(404, 'unknown file')
    total = sum(term.size for term in hub.store.files[hash])
    wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', request.headers.get('Range', ''))
    first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, total - 1)
    if first >= total:
        raise HubError(416, 'Range Not Satisfiable')
    terms: list[Term] = []
    skip = position = 0
    for term in hub.store.files[hash]:
        cut, before = _cut(hub.store.xorbs[term.xorb], term, first - position, last - position)
        if cut is not None:
            skip = skip if terms else first - position - before
            terms.append(cut)
        position += term.size
    return skip, terms


def _cut(found: Xorb, term: Term, first: int, last: int) -> tuple[Term | None, int]:
    """The chunks of a term that hold its bytes from first to last, and how many bytes of it lie before them."""
    inside, position = [], 0
    for index in range(term.first, term.end):
        if position <= last and position + found.chunks[index].size > first:
            inside.append((index, position))
        position += found.chunks[index].size
    if not inside:
        return None, 0
    (start, before), end = inside[0], inside[-1][0] + 1
    return Term(term.xorb, start, end, sum(chunk.size for chunk in found.chunks[start:end])), before


class Span(NamedTuple):
    """Chunks that a client shall fetch at once, and their bytes in the xorb, the last one included."""
    chunks: dict[str, int]
    bytes: dict[str, int]
    url: str


def _spans(hub: TestHub, terms: list[Term]) -> dict[str, list[Span]]:
    """What to fetch of each xorb; terms may overlap, spans do not."""
    ranges: dict[str, list[list[int]]] = {}
    for term in sorted(terms, key=lambda term: term.first):
        of_xorb = ranges.setdefault(term.xorb, [])
        if of_xorb and term.first <= of_xorb[-1][1]:
            of_xorb[-1][1] = max(of_xorb[-1][1], term.end)
        else:
            of_xorb.append([term.first, term.end])
    return {xorb: [_span(hub, xorb, *span) for span in of_xorb] for xorb, of_xorb in ranges.items()}


def _span(hub: TestHub, xorb: str, start: int, end: int) -> Span:
    chunks = hub.store.xorbs[xorb].chunks[start:end]
    first, last = chunks[0].start, chunks[-1].end - 1
    url = f'{hub.cdn}/xorbs/{xorb}/{first}-{last}'
    return Span(dict(start=start, end=end), dict(start=first, end=last), url)


def _reconstruction(skip: int, terms: list[Term], **where: Any) -> Reply:
    rows = [dict(hash=term.xorb, unpacked_length=term.size, range=dict(start=term.first, end=term.end))
            for term in terms]
    return json_reply(dict(offset_into_first_range=skip, terms=rows, **where))


def reconstruction_v1(hub: TestHub, request: Request, hash: str) -> Reply:
    skip, terms = _terms(hub, request, hash)
    fetch = {xorb: [dict(range=span.chunks, url=span.url, url_range=span.bytes) for span in spans]
             for xorb, spans in _spans(hub, terms).items()}
    return _reconstruction(skip, terms, fetch_info=fetch)


def reconstruction_v2(hub: TestHub, request: Request, hash: str) -> Reply:
    skip, terms = _terms(hub, request, hash)
    xorbs = {xorb: [dict(url=span.url, ranges=[dict(chunks=span.chunks, bytes=span.bytes)]) for span in spans]
             for xorb, spans in _spans(hub, terms).items()}
    return _reconstruction(skip, terms, xorbs=xorbs)


def xorb_data(hub: TestHub, request: Request, hash: str, span: str) -> Reply:
    """Bytes of a xorb, on the host of large files; whoever has the address may read them."""
    if request.headers.get('Range') != f'bytes={span}':
        raise HubError(403, 'the address is that of another range')
    return ranged(request, hub.store.xorbs[hash].body, {})
