"""What the test Hub holds: repositories with commits, branches, tags and pull requests, large files, users."""
import hashlib
from dataclasses import dataclass, field
from typing import Any

from .xet import Term, XetFile, Xorb, stored_xorb

LARGE = ('.safetensors', '.bin', '.onnx')  # by .gitattributes; other files are large when they are binary


class HubError(Exception):
    """An answer of the Hub that is not a success."""

    def __init__(self, status: int, message: str, code: str = ''):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    """A file's content; large ones are known by their SHA-256, others by git's SHA-1."""
    data: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else git_sha1(self.data)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def is_large(path: str, sample: bytes) -> bool:
    return path.endswith(LARGE) or b'\0' in sample


@dataclass
class User:
    """Who a token belongs to."""
    name: str
    role: str = 'write'
    orgs: tuple[str, ...] = ()

    def may_write(self, namespace: str) -> bool:
        return self.role == 'write' and namespace in (self.name, *self.orgs)


@dataclass
class Repo:
    """One repository of a model, or of a Space; commits are kept for ever, refs point to them."""
    name: str
    private: bool = False
    kind: str = 'model'
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)
    gated: bool = False
    hidden_numbers: int = 0  # of discussions that are not listed

    def __post_init__(self) -> None:
        self.add_commit('main', {'.gitattributes': Blob(b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n')}, 'new')

    def add_commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        oid = hashlib.sha1(f'{self.name} {len(self.commits)}'.encode()).hexdigest()
        self.commits[oid], self.titles[oid] = files, title
        self.branches[ref] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return oid

    def files(self, revision: str = 'main') -> dict[str, Blob]:
        return self.commits[self.resolve(revision)]

    def open_pull(self, title: str, author: str) -> str:
        """The ref of a new pull request on main."""
        number = len(self.pulls) + self.hidden_numbers + 1
        self.pulls.append(dict(num=number, title=title, author=author, status='open'))
        ref = f'refs/pr/{number}'
        self.branches[ref] = self.branches['main']
        return ref


class Store:
    """All repositories, uploaded large files and users of a Hub.

    Attributes:
        large: Large files by SHA-256.
        xorbs: What Xet's storage holds.
        files: Files of Xet's storage by their hash there.
        xet_hash: The hash in Xet's storage by SHA-256; every large file has one, also those that came another way.
        xet_tokens: What the tokens of Xet's storage allow, 'read' or 'write'.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, list[Term]] = {}
        self.xet_hash: dict[str, str] = {}
        self.xet_tokens: dict[str, str] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.users = {
            'hf_writer': User('me', orgs=('org',)),
            'hf_reader': User('me', role='read'),
            'hf_stranger': User('stranger'),
        }

    def add_large(self, data: bytes) -> str:
        """Keep a large file that did not come by Xet; returns its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self.large:
            xorb = stored_xorb(data)
            file = hashlib.blake2s(data).hexdigest()  # clients take any hash; Xet's own is another one
            self.xorbs[file] = xorb
            self.add_file(XetFile(file, [Term(file, 0, len(xorb.chunks), len(data))], sha256))
        return sha256

    def add_file(self, file: XetFile) -> None:
        """Keep a file whose xorbs are there.

        Raises:
            HubError: They are not, or make up another file.
        """
        try:
            data = b''.join(self.xorbs[term.xorb].data(term.first, term.end) for term in file.terms)
        except KeyError as e:
            raise HubError(400, f'xorb {e} was not uploaded') from e
        if len(data) != sum(term.size for term in file.terms) or hashlib.sha256(data).hexdigest() != file.sha256:
            raise HubError(400, f'the chunks of file {file.hash} make up another file')
        self.large[file.sha256] = data
        self.files[file.hash], self.xet_hash[file.sha256] = file.terms, file.hash

    def repo(self, name: str, user: User | None) -> Repo:
        """A repository that a user may see; others do not exist for them, as on the Hub."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and (user is None or not self.sees(user, repo))):
            raise HubError(404 if user else 401, 'Repository not found', 'RepoNotFound')
        return repo

    @staticmethod
    def sees(user: User, repo: Repo) -> bool:
        return repo.name.partition('/')[0] in (user.name, *user.orgs)

    def writable(self, name: str, user: User | None) -> Repo:
        repo = self.repo(name, user)
        self.check_write(name, user)
        return repo

    @staticmethod
    def check_write(name: str, user: User | None) -> None:
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        namespace = name.partition('/')[0]
        if not user.may_write(namespace):
            raise HubError(403, f"You don't have the rights to write to the namespace \"{namespace}\"")
