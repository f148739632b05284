"""The test Hub's answers: one function for each route, in a table at the end."""
import hashlib
import re
from typing import Callable
from urllib.parse import unquote

import yaml

from .downloads import cdn, resolve
from .server import Reply, Request, TestHub, json_reply
from .storage import chunk, reconstruction_v1, reconstruction_v2, shard_v1, shard_v2, xet_token, xorb, xorb_data
from .store import HubError, Repo
from .uploads import commit, lfs_batch, lfs_complete, lfs_put, lfs_put_part, lfs_verify, preupload

DATE = '2025-01-01T00:00:00.000Z'


def whoami(hub: TestHub, request: Request) -> Reply:
    user = request.user
    if user is None:
        raise HubError(401, 'Invalid username or password.')
    token = dict(accessToken=dict(role=user.role, displayName='test'))
    return json_reply(dict(type='user', name=user.name, orgs=[dict(name=o) for o in user.orgs], auth=token))


def create_repo(hub: TestHub, request: Request) -> Reply:
    wanted = request.json()
    if request.user is None:
        raise HubError(401, 'Invalid username or password.')
    name = f'{wanted["organization"] or request.user.name}/{wanted["name"]}'
    hub.store.check_write(name, request.user)
    kind = wanted.get('type') or 'model'
    url = dict(url=f'{hub.url}/spaces/{name}' if kind == 'space' else f'{hub.url}/{name}')
    if name in hub.store.repos:
        return json_reply(dict(url, error='You already created this model repo'), 409)
    hub.store.repos[name] = Repo(name, private=wanted.get('visibility') == 'private', kind=kind)
    return json_reply(url)


def delete_repo(hub: TestHub, request: Request) -> Reply:
    wanted = request.json()
    name = f'{wanted["organization"]}/{wanted["name"]}'
    del hub.store.repos[hub.store.writable(name, request.user).name]
    return Reply()


def validate_yaml(hub: TestHub, request: Request) -> Reply:
    """As far as the Hub's own check is known: the metadata is YAML, and a mapping."""
    content = request.json()['content']
    found = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
    try:
        if not found or not isinstance(yaml.safe_load(found[1]), dict):
            raise yaml.YAMLError('no metadata')
    except yaml.YAMLError as e:
        return json_reply(dict(errors=[dict(message=str(e))], warnings=[]), 400)
    return json_reply(dict(errors=[], warnings=[]))


def repo_info(hub: TestHub, request: Request, name: str, revision: str = 'main') -> Reply:
    repo = hub.store.repo(name, request.user)
    sha = repo.resolve(revision)
    siblings = [dict(rfilename=path) for path in repo.commits[sha]]
    return json_reply(dict(id=name, sha=sha, private=repo.private, siblings=siblings, tags=[], downloads=0, likes=0))


def tree(hub: TestHub, request: Request, name: str, revision: str) -> Reply:
    files = hub.store.repo(name, request.user).files(revision)
    rows = []
    for path, blob in files.items():
        pointer = dict(oid=blob.sha256, size=len(blob.data), pointerSize=130)
        rows.append(dict(type='file', path=path, size=len(blob.data), oid=hashlib.sha1(blob.data).hexdigest()
                         if blob.large else blob.oid,
                         **(dict(lfs=pointer, xetHash=hub.store.xet_hash[blob.sha256]) if blob.large else {})))
    return json_reply(rows)


def refs(hub: TestHub, request: Request, name: str) -> Reply:
    repo = hub.store.repo(name, request.user)

    def rows(named: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [dict(name=k, ref=f'refs/{kind}/{k}', targetCommit=v) for k, v in named.items()]

    branches = {k: v for k, v in repo.branches.items() if not k.startswith('refs/')}
    return json_reply(dict(branches=rows(branches, 'heads'), tags=rows(repo.tags, 'tags'), converts=[],
                           pullRequests=[]))


def discussions(hub: TestHub, request: Request, name: str) -> Reply:
    repo = hub.store.repo(name, request.user)
    rows = [dict(num=p['num'], title=p['title'], author=dict(name=p['author']), status=p['status'], createdAt=DATE,
                 isPullRequest=True, repo=dict(name=name, type='model')) for p in repo.pulls]
    return json_reply(dict(count=len(rows), start=0, discussions=rows))


def create_branch(hub: TestHub, request: Request, name: str, branch: str) -> Reply:
    repo = hub.store.writable(name, request.user)
    if branch in repo.branches:
        raise HubError(409, 'Reference already exists')
    repo.branches[branch] = repo.resolve(request.json().get('startingPoint', 'main'))
    return Reply()


def delete_branch(hub: TestHub, request: Request, name: str, branch: str) -> Reply:
    del hub.store.writable(name, request.user).branches[branch]
    return Reply()


def create_tag(hub: TestHub, request: Request, name: str, revision: str) -> Reply:
    repo = hub.store.writable(name, request.user)
    tag = request.json()['tag']
    if tag in repo.tags:
        raise HubError(409, 'Tag reference exists already')
    repo.tags[tag] = repo.resolve(revision)
    return Reply()


NAME = r'([\w.-]+/[\w.-]+)'
KINDS = '(?:models|spaces)'  # names of both are kept in one list here
ROUTES: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
    ('GET', r'/api/whoami-v2', whoami),
    ('POST', r'/api/repos/create', create_repo),
    ('DELETE', r'/api/repos/delete', delete_repo),
    ('POST', r'/api/validate-yaml', validate_yaml),
    ('GET', rf'/api/{KINDS}/{NAME}', repo_info),
    ('GET', rf'/api/{KINDS}/{NAME}/revision/([^/]+)', repo_info),
    ('GET', rf'/api/models/{NAME}/tree/([^/]+)', tree),
    ('GET', rf'/api/models/{NAME}/refs', refs),
    ('GET', rf'/api/models/{NAME}/discussions', discussions),
    ('POST', rf'/api/models/{NAME}/branch/([^/]+)', create_branch),
    ('DELETE', rf'/api/models/{NAME}/branch/([^/]+)', delete_branch),
    ('POST', rf'/api/models/{NAME}/tag/([^/]+)', create_tag),
    ('POST', rf'/api/{KINDS}/{NAME}/preupload/([^/]+)', preupload),
    ('POST', rf'/api/{KINDS}/{NAME}/commit/([^/]+)', commit),
    ('POST', rf'/{NAME}\.git/info/lfs/objects/batch', lfs_batch),
    ('PUT', r'/lfs-put/(\w+)', lfs_put),
    ('PUT', r'/lfs-put/(\w+)/(\d+)', lfs_put_part),
    ('POST', r'/lfs-complete/(\w+)', lfs_complete),
    ('POST', rf'/lfs-verify/{NAME}', lfs_verify),
    ('GET', rf'/{NAME}/resolve/([^/]+)/(.+)', resolve),
    ('GET', r'/cdn/(\w+)', cdn),
    ('GET', rf'/api/{KINDS}/{NAME}/xet-(read|write)-token/([^/]+)', xet_token),
    ('GET', r'/cas/v1/chunks/[\w-]+/(\w+)', chunk),
    ('POST', r'/cas/v1/xorbs/default/(\w+)', xorb),
    ('POST', r'/cas/v1/shards', shard_v1),
    ('POST', r'/cas/v2/shards', shard_v2),
    ('GET', r'/cas/v1/reconstructions/(\w+)', reconstruction_v1),
    ('GET', r'/cas/v2/reconstructions/(\w+)', reconstruction_v2),
    ('GET', r'/xorbs/(\w+)/(\d+-\d+)', xorb_data),
)


def answer(hub: TestHub, request: Request) -> Reply:
    """The reply to a request; HEAD is answered as GET, without the body."""
    method = 'GET' if request.method == 'HEAD' else request.method
    for wanted, pattern, function in ROUTES:
        found = re.fullmatch(pattern, request.path)
        if found and wanted == method:
            return function(hub, request, *map(unquote, found.groups()))
    raise HubError(404, f'no route {request.method} {request.path}')
