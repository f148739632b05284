"""What a publication depends on, beside the run."""
from dataclasses import dataclass, fields

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.options import Options, option

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
        licence_name: Name of a licence that has no id there, with the id 'other'.
        licence_link: Address of its text, or the file LICENSE or LICENSE.md of the run folder.
        weights: 'best' of the run; 'raw' or 'ema', the weights or their average in the last checkpoint.
        dtype: 'fp32' or 'fp16'.
        data_dir: Where the data of the run are now, on which float16 weights are measured; '' for where they were.
        dataset_id: The data set's name on the Hub, where it is not known from the run.
        dataset_name: What the card calls the data set; '' for its source or folder.
        beside: Run folders whose results stand in the card's table: other seeds, controls.
        pictures: Send the confusion matrix and the images of greatest loss, and show them on the card.
        card_only: The card says that the weights are not published yet.
        head_only: The head alone, with the name and the hash of the weights of its frozen backbone.
    """
    repo: str
    private: bool = False
    branch: str = ''
    pull_request: bool = False
    tag: str = ''
    licence: str = ''
    licence_name: str = ''
    licence_link: str = ''
    weights: str = 'best'
    dtype: str = 'fp32'
    data_dir: str = ''
    dataset_id: str = ''
    dataset_name: str = ''
    beside: tuple[str, ...] = ()
    pictures: bool = True
    card_only: bool = False
    head_only: bool = False


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
        raise UserError(f"{flag} {repo!r}: it is not a repository name; write it as owner/name, with letters, digits, "
                        "'-', '_' and '.'") from e


@dataclass
class HubOptions(Options, applies_to=('training',), on_resume='silent', recipe=False):
    """Hub"""
    push_to_hub: str = option('', 'repository on the Hugging Face Hub, owner/name: publish the best weights at the end')
    push_interval: int = option(0, 'publish the best weights so far every so many epochs too, when above 0', low=0)
    hub_license: str = option(
        '', 'licence of the published weights, an id of the Hub such as apache-2.0; not given: that of the weights '
        'which training starts from')
    hub_license_name: str = option('', "name of a licence that has no id on the Hub, with --hub-license other")
    hub_license_link: str = option('', 'address of the text of such a licence')
    hub_private: bool = option(False, 'make a private repository')
    hub_pictures: bool = option(
        True, 'show the confusion matrix and the images of greatest loss on the card; --no-hub-pictures leaves them '
        'out: the latter are images of your data')


@dataclass
class TrainAndPushConfig(HubOptions, TrainConfig):
    """What ``timm-spinal train`` takes: a run, and where its weights go."""


def split_config(config: TrainAndPushConfig) -> tuple[TrainConfig, HubOptions]:
    """The run, which knows nothing of the Hub, and the rest."""
    of_hub = {f.name for f in fields(HubOptions)}
    values = vars(config)
    return (TrainConfig(**{k: v for k, v in values.items() if k not in of_hub}),
            HubOptions(**{k: v for k, v in values.items() if k in of_hub}))
