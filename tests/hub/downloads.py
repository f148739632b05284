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
        route = f'{hub.url}/api/models/{name}/xet-read-token/{sha}'
        headers.update({'X-Linked-Size': str(len(blob.data)), 'X-Linked-Etag': f'"{blob.sha256}"',
                        'Location': f'{hub.cdn}/cdn/{blob.sha256}', 'X-Xet-Hash': hub.store.xet_hash[blob.sha256],
                        'X-Xet-Refresh-Route': route, 'Link': f'<{route}>; rel="xet-auth"'})
        return Reply(302, b'', headers)
    return ranged(request, blob.data, headers)


def cdn(hub: TestHub, request: Request, oid: str) -> Reply:
    return ranged(request, hub.store.large[oid], {'ETag': f'"{oid}"'})


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Reply:
    """Data, or the range of them that the request names."""
    wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
    if not wanted or wanted[0] == 'bytes=0-':
        return Reply(200, data, {**headers, 'Content-Length': str(len(data))})
    first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
    if first >= len(data):
        raise HubError(416, 'Range Not Satisfiable')
    part = data[first:last + 1]
    return Reply(206, part, {**headers, 'Content-Range': f'bytes {first}-{first + len(part) - 1}/{len(data)}'})
