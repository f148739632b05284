"""The test Hub's answers to downloads; large files are on another host, as on the Hub."""
import re

from .server import Reply, Request, TestHub, error_reply
from .store import HubError


def resolve(hub: TestHub, request: Request, name: str, revision: str, path: str) -> Reply:
    repo = hub.store.repo(name, request.user)
    if repo.gated and (request.user is None or not hub.store.sees(request.user, repo)):
        raise HubError(403, 'Access to this model is restricted', 'GatedRepo')
    sha = repo.resolve(revision)
    headers = {'X-Repo-Commit': sha}
    if path not in repo.commits[sha]:
        reply = error_reply(HubError(404, 'Entry not found', 'EntryNotFound'))
        return reply._replace(headers={**reply.headers, **headers})
    blob = repo.commits[sha][path]
    headers['ETag'] = f'"{blob.oid}"'
    if blob.large:
        headers.update({'X-Linked-Size': str(len(blob.data)), 'X-Linked-Etag': f'"{blob.sha256}"',
                        'Location': f'{hub.cdn}/cdn/{blob.sha256}'})
        return Reply(302, b'', headers)
    return _ranged(request, blob.data, headers)


def cdn(hub: TestHub, request: Request, oid: str) -> Reply:
    return _ranged(request, hub.store.large[oid], {'ETag': f'"{oid}"'})


def _ranged(request: Request, data: bytes, headers: dict[str, str]) -> Reply:
    wanted = re.fullmatch(r'bytes=(\d+)-', request.headers.get('Range', ''))
    if wanted and int(wanted[1]):
        first = int(wanted[1])
        return Reply(206, data[first:], {**headers, 'Content-Range': f'bytes {first}-{len(data) - 1}/{len(data)}'})
    return Reply(200, data, {**headers, 'Content-Length': str(len(data))})
