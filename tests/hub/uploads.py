"""The test Hub's answers to uploads: preupload, large files, commits."""
import base64
import hashlib
import json
from typing import Any

from .server import PART, Reply, Request, TestHub, json_reply
from .store import Blob, HubError, Repo, is_large


def preupload(hub: TestHub, request: Request, name: str, revision: str) -> Reply:
    repo = _pushable(hub, request, name)
    have = repo.files(revision)
    rows = []
    for file in request.json()['files']:
        path, sample = file['path'], base64.b64decode(file['sample'])
        mode = 'lfs' if is_large(path, sample) else 'regular'
        rows.append(dict(path=path, uploadMode=mode, shouldIgnore=False, oid=have[path].oid if path in have else None))
    return json_reply(dict(files=rows))


def lfs_batch(hub: TestHub, request: Request, name: str) -> Reply:
    """Where each large file goes: nowhere when it is there, one PUT, or a PUT for each part and a completion."""
    repo = hub.store.repo(name, request.user)
    objects = []
    for entry in request.json()['objects']:
        oid, size = entry['oid'], entry['size']
        row = dict(oid=oid, size=size)
        if oid not in hub.store.large:
            upload: dict[str, Any] = dict(href=f'{hub.url}/lfs-put/{oid}')
            if size > PART:
                parts = range(1, -(-size // PART) + 1)
                header = {str(n): f'{hub.url}/lfs-put/{oid}/{n}' for n in parts}
                upload = dict(href=f'{hub.url}/lfs-complete/{oid}', header=dict(header, chunk_size=str(PART)))
            verify = dict(href=f'{hub.url}/lfs-verify/{repo.name}')
            row['actions'] = dict(upload=upload, verify=verify)
        objects.append(row)
    transfer = 'xet' if 'xet' in request.json().get('transfers', ()) else 'basic'  # clients before 1.31 ask for it here
    return json_reply(dict(transfer=transfer, objects=objects))


def lfs_put(hub: TestHub, request: Request, oid: str) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, 'the content has another hash than was announced')
    hub.store.add_large(request.body)
    return Reply()


def lfs_put_part(hub: TestHub, request: Request, oid: str, part: str) -> Reply:
    hub.store.parts[oid, int(part)] = request.body
    return Reply(headers={'ETag': f'"{hashlib.md5(request.body).hexdigest()}"'})


def lfs_complete(hub: TestHub, request: Request, oid: str) -> Reply:
    numbers = [row['partNumber'] for row in request.json()['parts']]
    body = b''.join(hub.store.parts.pop((oid, n)) for n in sorted(numbers))
    return lfs_put(hub, request._replace(body=body), oid)


def lfs_verify(hub: TestHub, request: Request, name: str) -> Reply:
    if request.json()['oid'] not in hub.store.large:
        raise HubError(404, 'no such object')
    return Reply()


def commit(hub: TestHub, request: Request, name: str, revision: str) -> Reply:
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]['value']
    pull = request.query.get('create_pr') == '1'
    repo = _pushable(hub, request, name)
    user = request.user
    if user is None or not (pull or user.may_write(name.partition('/')[0])):
        raise HubError(403, "You don't have the rights to write to this repository")
    if revision not in repo.branches:
        raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
    if header.get('parentCommit', repo.branches[revision]) != repo.branches[revision]:
        raise HubError(412, 'A commit has happened since. Please refresh and try again.')
    files = dict(repo.files(revision))
    for line in lines[1:]:
        _apply(hub, files, line['key'], line['value'])
    ref = repo.open_pull(header['summary'], user.name) if pull else revision
    oid = repo.add_commit(ref, files, header['summary'])
    number = ref.rpartition('/')[2]
    return json_reply(dict(success=True, commitOid=oid, commitUrl=f'{hub.url}/{name}/commit/{oid}',
                           pullRequestUrl=f'{hub.url}/{name}/discussions/{number}' if pull else None))


def _apply(hub: TestHub, files: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
    if kind == 'file':
        files[value['path']] = Blob(base64.b64decode(value['content']))
    elif kind == 'lfsFile':
        if value['oid'] not in hub.store.large:
            raise HubError(400, f'large file {value["path"]} was not uploaded')
        files[value['path']] = Blob(hub.store.large[value['oid']], large=True)
    elif kind == 'deletedFile':
        del files[value['path']]


def _pushable(hub: TestHub, request: Request, name: str) -> Repo:
    """A pull request needs no right to write."""
    if request.query.get('create_pr') == '1' and request.user is not None:
        return hub.store.repo(name, request.user)
    return hub.store.writable(name, request.user)
