"""Sending a package to the Hub: one commit that is there as a whole or not at all."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from timm_spinal.errors import UserError
from timm_spinal.training.damage import git_sha1
from timm_spinal.training.files import sha256
from timm_spinal.training.remote import LOG_IN, answer_of, chain

from .download import check_download
from .options import PublishOptions, check_repo_name
from .package import FILES
from .retry import Say, with_retries


@dataclass
class Push:
    """One publication on its way.

    Attributes:
        options: Where to.
        folder: The package.
        title: Of the commit or pull request.
        say: Gets a line for each step.
        undo: What to take back when a later step fails, the last first.
    """
    options: PublishOptions
    folder: Path
    title: str
    say: Say = print
    api: HfApi = field(default_factory=lambda: HfApi(library_name='timm_spinal'))
    undo: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def repo(self) -> str:
        return self.options.repo

    def call(self, action: Callable[[], Any]) -> Any:
        return with_retries(action, self.repo, self.say)


def check_account(options: PublishOptions, say: Say = print) -> PublishOptions:
    """The options with a full repository name, after asking the Hub whose token this is.

    Raises:
        UserError: Malformed name, no token, a token that is not valid or may only read, no network, or not wanted.
    """
    check_repo_name(options.repo)
    if options.pull_request and options.branch:
        raise UserError('--pull-request goes to main; leave out --branch')
    if constants.HF_HUB_OFFLINE:
        raise UserError(f'{options.repo}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it (--dry-run of '
                        'timm-spinal publish needs no Hub)')
    if get_token() is None:
        raise UserError(f'{options.repo}: no token of the Hub; {LOG_IN}')
    user, role = with_retries(_whoami, options.repo, say)
    if role == 'read':
        raise UserError(f'{options.repo}: the token of {user} may only read; make one with write permission on '
                        'hf.co/settings/tokens')
    name = options.repo if '/' in options.repo else f'{user}/{options.repo}'
    return PublishOptions(**{**vars(options), 'repo': name})


def _whoami() -> tuple[str, str | None]:
    """Whose token this is, and what it may do, where the Hub says that."""
    me = HfApi().whoami()
    return me['name'], me.get('auth', {}).get('accessToken', {}).get('role')


def publish(folder: Path, options: PublishOptions, title: str, say: Say = print) -> str:
    """Send a package; done when it has been downloaded again and found to be the same.

    Args:
        folder: A package, from `build_package`.
        options: With a full repository name, from `check_account`.
        title: Of the commit or pull request.
        say: Gets a line for each step.

    Returns:
        The commit's id.

    Raises:
        UserError: It failed, and the repository is as it was before; or the check or the tag did, and the message
            names the commit.
    """
    push = Push(options, folder, title, say)
    try:
        _ensure_repository(push)
        revision = _ensure_branch(push)
        commit = _pull_request(push) if options.pull_request else _commit(push, revision)
    except UserError:
        _take_back(push)
        raise
    try:
        check_download(push.repo, commit, folder, say)
        if options.tag:
            _tag(push, commit)
    except UserError as e:
        raise UserError(f'{e} (the files are committed, as {commit[:8]})') from e
    return commit


def _ensure_repository(push: Push) -> None:
    """The repository, made when it is not there."""
    def info() -> Any:
        try:
            return push.api.model_info(push.repo)
        except RepositoryNotFoundError:
            return None

    found = push.call(info)
    if found is None:
        push.call(lambda: _create_repository(push))
        push.undo.append(lambda: _remove_if_empty(push))
        push.say(f'{push.repo}: new {"private " if push.options.private else ""}repository')
    elif push.options.private and not found.private:
        raise UserError(f'{push.repo}: exists and is public; leave out --private, or make it private in its settings '
                        'first')


def _create_repository(push: Push) -> None:
    """Make the repository; that it is there already is no error, as after a try whose answer was lost."""
    try:
        push.api.create_repo(push.repo, private=push.options.private)
    except Exception as e:
        answer = next(filter(None, map(answer_of, chain(e))), None)
        if answer is None or answer.status != 409 or not push.api.repo_exists(push.repo):
            raise


def _remove_if_empty(push: Push) -> None:
    if set(push.api.list_repo_files(push.repo)) <= {'.gitattributes'}:
        push.api.delete_repo(push.repo)


def _ensure_branch(push: Push) -> str:
    """The branch to commit to, made from main when it is not there."""
    branch = push.options.branch
    if not branch or branch == 'main':
        return 'main'
    refs = push.call(lambda: push.api.list_repo_refs(push.repo))
    if branch not in [ref.name for ref in refs.branches]:
        push.call(lambda: push.api.create_branch(push.repo, branch=branch, exist_ok=True))
        push.undo.append(lambda: push.api.delete_branch(push.repo, branch=branch))
    return branch


def _take_back(push: Push) -> None:
    for action in reversed(push.undo):
        try:
            action()
        except Exception:  # whatever stopped us may stop this too; the error that is told is the first one
            push.say(f'{push.repo}: what was made for this publication is empty and could not be removed')


# ---- commit -----------------------------------------------------------------------------------------------------


def _commit(push: Push, revision: str) -> str:
    """One commit with all files; none when the revision holds exactly them."""
    def commit() -> str:
        head = push.api.model_info(push.repo, revision=revision).sha
        remote = _remote_files(push, revision)
        if _same(push.folder, remote):  # also after a commit whose answer was lost
            return str(head)
        info = push.api.create_commit(
            push.repo, _operations(push.folder, remote), commit_message=push.title, revision=revision,
            parent_commit=head)
        push.say(f'{push.repo}: committed to {revision}')
        return info.oid

    return push.call(commit)


def _pull_request(push: Push) -> str:
    """A pull request with all files; none when main or an open one with this title holds exactly them."""
    def pull() -> str:
        refs = ['main', *(d.git_reference or '' for d in push.api.get_repo_discussions(push.repo)
                          if d.is_pull_request and d.status == 'open' and d.title == push.title)]
        for ref in refs:
            if _same(push.folder, _remote_files(push, ref)):
                push.say(f'{push.repo}: {ref} holds exactly this')
                return str(push.api.model_info(push.repo, revision=ref).sha)
        info = push.api.create_commit(
            push.repo, _operations(push.folder, _remote_files(push, 'main')), commit_message=push.title, create_pr=True)
        push.say(f'{push.repo}: pull request {info.pr_url}')
        return info.oid

    return push.call(pull)


def _operations(folder: Path, remote: dict[str, Any]) -> list[Any]:
    mine = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
    stale = [CommitOperationDelete(name) for name in FILES if name in remote and name not in mine]
    return stale + [CommitOperationAdd(name, folder / name) for name in sorted(mine)]


def _remote_files(push: Push, revision: str) -> dict[str, Any]:
    """Checksum by file name: SHA-256 for large files, git's SHA-1 for others."""
    rows = push.api.list_repo_tree(push.repo, recursive=True, revision=revision)
    return {row.path: row.lfs.sha256 if row.lfs else row.blob_id for row in rows if isinstance(row, RepoFile)}


def _same(folder: Path, remote: dict[str, str]) -> bool:
    """Whether a revision holds the package's files, and none of `FILES` that the package has not."""
    mine = {str(p.relative_to(folder)): p for p in folder.rglob('*') if p.is_file()}
    if {name for name in remote if name in FILES} != mine.keys():
        return False
    return all(remote[name] in (sha256(path), git_sha1(path)) for name, path in mine.items())


def _tag(push: Push, commit: str) -> None:
    tag = push.options.tag

    def create() -> None:
        try:
            there = push.api.model_info(push.repo, revision=tag).sha
        except RevisionNotFoundError:
            push.api.create_tag(push.repo, tag=tag, revision=commit, exist_ok=True)
            push.say(f'{push.repo}: tag {tag}')
            return
        if there != commit:
            raise UserError(f'{push.repo}: the tag {tag} is on another commit; choose another name')

    push.call(create)
