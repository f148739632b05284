"""A package as one commit on a branch or in a pull request; none where it is there already."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from timm_spinal.files import sha256
from timm_spinal.models.hub_checksums import git_sha1

from .options import PublishOptions
from .package import FILES, Package, hub_name
from .retry import Say, with_retries


@dataclass
class Push:
    """One publication on its way.

    Attributes:
        options: Where to.
        package: What is sent.
        title: Of the commit or pull request.
        say: Gets a line for each step.
        undo: What to take back when a later step fails, the last first.
    """
    options: PublishOptions
    package: Package
    title: str
    say: Say = print
    api: HfApi = field(default_factory=lambda: HfApi(library_name='timm_spinal'))
    undo: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def repo(self) -> str:
        return self.options.repo

    @property
    def folder(self) -> Path:
        return self.package.folder

    def call(self, action: Callable[[], Any]) -> Any:
        return with_retries(action, self.repo, self.say)


def head_of(push: Push, revision: str) -> str | None:
    """The commit of a revision; None where there is none."""
    try:
        return push.api.model_info(push.repo, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def commit_files(push: Push, revision: str) -> str:
    """One commit with all files; none when the revision holds exactly them."""
    def commit() -> str:
        head = push.api.model_info(push.repo, revision=revision).sha
        if holds(push, revision):  # also after a commit whose answer was lost
            return str(head)
        info = push.api.create_commit(
            push.repo, _operations(push, revision), commit_message=push.title, revision=revision, parent_commit=head)
        push.say(f'{push.repo}: committed to {revision}')
        return info.oid

    return push.call(commit)


def pull_request(push: Push) -> str:
    """The ref of a pull request with all files; main, or an open one with this title, when it holds exactly them.

    The card in it says its number, which is the next one of the repository. Where somebody else has taken that in the
    meantime, the commit that follows corrects it.
    """
    def pull() -> str:
        discussions = list(push.api.get_repo_discussions(push.repo))
        for ref in pull_request_refs(push, discussions):
            if holds(push, ref):
                push.say(f'{push.repo}: {ref} has exactly these files already')
                return ref
        number = 1 + max((d.num for d in discussions), default=0)
        push.package.address(hub_name(push.repo, f'refs/pr/{number}'))
        info = push.api.create_commit(
            push.repo, _operations(push, 'main'), commit_message=push.title, create_pr=True)
        push.say(f'{push.repo}: pull request {info.pr_url}')
        return str(info.pr_revision)

    return push.call(pull)


def pull_request_refs(push: Push, discussions: list[Any]) -> list[str]:
    """Where a pull request with these files may be already: on main, or open under this title."""
    return ['main', *(d.git_reference or '' for d in discussions
                      if d.is_pull_request and d.status == 'open' and d.title == push.title)]


def holds(push: Push, revision: str) -> bool:
    """Whether a revision holds the package's files, with the card addressed to it, and no other of `FILES`."""
    push.package.address(hub_name(push.repo, revision))
    mine, remote = _files(push.folder), _remote_files(push, revision)
    if {name for name in remote if name in FILES or name in mine} != mine.keys():
        return False
    return all(remote[name] in (sha256(path), git_sha1(path)) for name, path in mine.items())


def _operations(push: Push, revision: str) -> list[Any]:
    mine, remote = _files(push.folder), _remote_files(push, revision)
    stale = [CommitOperationDelete(name) for name in FILES if name in remote and name not in mine]
    return stale + [CommitOperationAdd(name, path) for name, path in sorted(mine.items())]


def _files(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in folder.rglob('*') if p.is_file()}


def _remote_files(push: Push, revision: str) -> dict[str, Any]:
    """Checksum by file name: SHA-256 for large files, git's SHA-1 for others."""
    rows = push.api.list_repo_tree(push.repo, recursive=True, revision=revision)
    return {row.path: row.lfs.sha256 if row.lfs else row.blob_id for row in rows if isinstance(row, RepoFile)}
