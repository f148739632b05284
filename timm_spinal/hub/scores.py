"""The accuracies of what is published: which there are, on which split, and how they are called."""
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from timm_spinal.evaluation.metrics import TITLES, main_accuracy
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.named_datasets import torch_split


@dataclass(frozen=True)
class Score:
    """What was measured of the weights on one split.

    Attributes:
        split: Name of the split in its data set.
        accuracies: Percent by name, a key of `metrics.TITLES`; the main one first.
        images: Images in it, where known.
        chosen_on: The epoch was chosen by this split.
    """
    split: str
    accuracies: dict[str, float]
    images: int | None
    chosen_on: bool


def title(name: str) -> str:
    """What an accuracy is called in the metadata of a card."""
    return f'{TITLES[name]} accuracy'


def accuracies_in(values: dict[str, Any], prefix: str = '') -> dict[str, float]:
    """Those of a result or of a row of summary.csv, such as ``test_top1`` for the prefix ``test_``; none if missing."""
    found = {name: values.get(prefix + name) for name in TITLES}
    return {name: float(value) for name, value in found.items() if value is not None}


def scores_of(args: TrainConfig, result: dict[str, Any]) -> list[Score]:
    """What result.json tells of the best weights: the test split, then the one that chose the epoch."""
    found = [
        Score(split_name(args, args.test_split), accuracies_in(result, 'test_'), result.get('test_images'), False),
        Score(validation_split(args), accuracies_in(result), result.get('eval_size'), True),
    ]
    return [score for score in found if score.accuracies]


def compared_metric(result: dict[str, Any]) -> str:
    """The key of result.json by which runs are compared: of the test split where it was read."""
    name = main_accuracy(result)
    return f'test_{name}' if result.get(f'test_{name}') is not None else name


def validation_split(args: TrainConfig) -> str:
    """The split that chose the epoch, in words where it is a cut."""
    if args.val_split_fraction:
        return f'{args.val_split_fraction:g} of {args.train_split}'
    return split_name(args, args.val_split)


def split_name(args: TrainConfig, name: str) -> str:
    """A split's own name in its data set."""
    prefix, _, dataset = args.dataset.partition('/')
    return torch_split(dataset.lower(), name) if prefix.lower() == 'torch' else name


def stated_accuracy(card: ModelCardData, split: str) -> tuple[str, float] | None:
    """The main accuracy that a card names for a split, as its name and percent; None where it names none."""
    stated = {result.metric_name: 100 * result.metric_value
              for result in card.eval_results or [] if result.dataset_split == split}
    return next(((name, stated[title(name)]) for name in TITLES if title(name) in stated), None)
