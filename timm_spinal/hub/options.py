"""What a publication depends on, beside the run."""
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from timm_spinal.errors import UserError

WEIGHTS = ('best', 'raw', 'ema')
DTYPES = ('fp32', 'fp16')


@dataclass(frozen=True)
class PublishOptions:
    """Where a run goes and in which form.

    Attributes:
        repo: ``owner/name``, or ``name`` for a repository of one's own.
        private: Make the repository private; one that exists must be.
        branch: Commit to this branch, which is made from main when it is not there.
        pull_request: Open a pull request on main instead of committing.
        tag: Name of a git tag for the commit.
        licence: Id of a licence that the Hub knows; '' for that of the weights that training started from.
        weights: 'best' of the run; 'raw' or 'ema', the weights or their average in the last checkpoint.
        dtype: 'fp32' or 'fp16'.
        dataset_id: The data set's name on the Hub, where it is not known from the run.
        beside: Run folders whose results stand in the card's table: other seeds, controls.
    """
    repo: str
    private: bool = False
    branch: str = ''
    pull_request: bool = False
    tag: str = ''
    licence: str = ''
    weights: str = 'best'
    dtype: str = 'fp32'
    dataset_id: str = ''
    beside: tuple[str, ...] = ()


def check_repo_name(repo: str, flag: str = '--repo') -> None:
    """Refuse what the Hub does not take as a repository's name.

    Raises:
        UserError: It is malformed.
    """
    try:
        validate_repo_id(repo)
        if not repo:
            raise HFValidationError('empty')
    except HFValidationError as e:
        raise UserError(f"{flag} {repo!r}: is no repository name; write it as owner/name, with letters, digits, '-', "
                        "'_' and '.'") from e
