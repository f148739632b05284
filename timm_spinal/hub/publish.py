"""Sending a package to the Hub: one commit that is there as a whole or not at all."""
import re
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from timm_spinal.errors import UserError
from timm_spinal.models.hub_errors import LOG_IN, answer_of, chain

from .commit import Push, commit_files, head_of, holds, pull_request, pull_request_refs
from .download import check_download
from .options import PublishOptions, check_repo_name
from .package import Package, hub_name
from .retry import Say, with_retries

# what git does not take, and the @ that timm would not understand
_NO_NAME_OF_A_REF = re.compile(r'[^\w./-]|\.\.|//|^[-/.]|[/.]$|\.lock$|^refs/')


class Published(NamedTuple):
    """A publication that is on the Hub.

    Attributes:
        repo: Its repository.
        commit: Id of the commit that holds it.
        revision: Branch, pull request ('refs/pr/N') or tag of it.
    """
    repo: str
    commit: str
    revision: str

    @property
    def line(self) -> str:
        """What a user is told at the end, with the code that loads it."""
        name = hub_name(self.repo, self.revision)
        return f"published {self.repo} at {self.commit[:8]}: timm.create_model('{name}', pretrained=True)"


def check_account(options: PublishOptions, say: Say = print) -> PublishOptions:
    """The options with a full repository name, after asking the Hub whose token this is.

    Raises:
        UserError: Malformed name, no token, a token that is not valid or may only read, no network, or not wanted.
    """
    check_repo_name(options.repo)
    if options.pull_request and options.branch:
        raise UserError('--pull-request goes to main; leave out --branch')
    if options.tag in (options.branch, 'main') and options.tag:
        raise UserError(f'--tag {options.tag}: is the name of a branch; choose another name')
    for name, flag in ((options.branch, '--branch'), (options.tag, '--tag')):
        if _NO_NAME_OF_A_REF.search(name):
            raise UserError(f"{flag} {name!r}: cannot be what follows the @ of a name on the Hub; use letters, digits, "
                            "'-', '_', '.' and '/'")
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


def publish(package: Package, options: PublishOptions, title: str, say: Say = print) -> Published:
    """Send a package; done when it has been downloaded again and found to be the same.

    Args:
        package: From `build_package`; its card is made to load the revision that it is sent to.
        options: With a full repository name, from `check_account`.
        title: Of the commit or pull request.
        say: Gets a line for each step.

    Returns:
        Where it is.

    Raises:
        UserError: It failed, and the repository is as it was before; or the check or the tag did, and the message
            names the commit.
    """
    push = Push(options, package, title, say)
    _check_tag(push)
    try:
        _ensure_repository(push)
        revision = pull_request(push) if options.pull_request else _ensure_branch(push)
        commit = commit_files(push, revision)
    except UserError:
        _take_back(push)
        raise
    try:
        check_download(push.repo, commit, push.folder, say)
        if options.tag:
            _tag(push, commit)
    except UserError as e:
        raise UserError(f'{e} (the files are committed, as {commit[:8]})') from e
    return Published(push.repo, commit, options.tag or revision)


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


# ---- tag -------------------------------------------------------------------------------------------------------


def _tag(push: Push, commit: str) -> None:
    tag = push.options.tag

    def create() -> None:
        there = head_of(push, tag)
        if there is None:
            push.api.create_tag(push.repo, tag=tag, revision=commit, exist_ok=True)
            push.say(f'{push.repo}: tag {tag}')
        elif there != commit:
            raise _taken(push)

    push.call(create)


def _check_tag(push: Push) -> None:
    """Refuse a tag that is taken, before anything is changed; it may be where this publication is already.

    Raises:
        UserError: It is on another commit, or is the name of a branch.
    """
    def check() -> None:
        tagged = head_of(push, push.options.tag)
        if tagged is None:
            return
        refs = [push.options.branch or 'main']
        if push.options.pull_request:
            refs = pull_request_refs(push, list(push.api.get_repo_discussions(push.repo)))
        for ref in refs:
            if head_of(push, ref) == tagged and holds(push, ref):
                return
        raise _taken(push)

    if push.options.tag:
        push.call(check)


def _taken(push: Push) -> UserError:
    return UserError(f'{push.repo}: the tag {push.options.tag} is on another commit; choose another name')
