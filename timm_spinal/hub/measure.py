"""The accuracy of a package's weights, measured on the data of its recipe."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm_spinal.errors import UserError
from timm_spinal.training.config import DataOptions, TrainConfig, ValidateConfig
from timm_spinal.training.distributed import new_accelerator
from timm_spinal.training.options import option_names
from timm_spinal.validate import Candidate, validate_one

from .publication import Publication
from .scores import Score, split_name, validation_split

TOLERANCE = 0.1  # points; on other hardware an image at the border may fall to the other side
_ROUNDING = 1e-4  # points; a card has six digits of a part of one


@dataclass
class Where:
    """Where the data of a recipe are, and how they are read.

    Attributes:
        data_dir: Their folder.
        dataset: Their source; '' for that of the recipe.
        dataset_download: The source may download.
        batch_size: Images per step.
        workers: Loader processes.
    """
    data_dir: str = ''
    dataset: str = ''
    dataset_download: bool = False
    batch_size: int = 128
    workers: int = 4


def tolerance(images: int) -> float:
    """Points by which an accuracy over so many images may differ from a stated one: 0.1, and one image at least."""
    return max(TOLERANCE, 100 / images) + _ROUNDING


def evaluation(recipe: TrainConfig, folder: Path, where: Any, test: bool | None = None) -> tuple[ValidateConfig, str]:
    """An evaluation of a package on a split of its recipe, and the split's name.

    Args:
        recipe: The published options.
        folder: The package.
        where: A `Where`, or what has its attributes.
        test: The test split, or the one that chose the epoch; None for the test split where the recipe has one.
    """
    options = {name: getattr(recipe, name) for name in option_names(DataOptions, recipe=True)}
    split = validation_split(recipe)
    if recipe.test_split and test is not False:
        options.update(val_split=recipe.test_split, val_split_fraction=0.)
        split = split_name(recipe, recipe.test_split)
    options.update(data_dir=where.data_dir, dataset=where.dataset or recipe.dataset,
                   dataset_download=where.dataset_download)
    return ValidateConfig(
        **options, model=f'local-dir:{folder}', pretrained=True, seed=recipe.seed, batch_size=where.batch_size,
        workers=where.workers), split


def measure(publication: Publication, folder: Path, data_dir: str = '') -> list[Score]:
    """The scores of a source, measured again with the weights of a package.

    Args:
        publication: Whose run says on which splits, and has the data options.
        folder: The package.
        data_dir: Where the data are now; '' for where they were.

    Raises:
        UserError: The data cannot be had, or are not as many images as they were.
    """
    run = publication.args
    assert run is not None
    where = Where(data_dir or run.data_dir, workers=run.workers,
                  batch_size=run.validation_batch_size or run.batch_size)
    return [_measure_one(score, run, folder, where) for score in publication.scores]


def _measure_one(score: Score, run: TrainConfig, folder: Path, where: Where) -> Score:
    is_test = bool(run.test_split) and score.split == split_name(run, run.test_split)
    config, split = evaluation(run, folder, where, is_test)
    row = validate_one(new_accelerator('no'), Candidate(f'the weights on {split}', config), set())
    if score.images and row['images'] != score.images:
        raise UserError(f'{split}: has {row["images"]} images now and had {score.images} in the run')
    return replace(score, accuracies={name: row[name] for name in score.accuracies}, images=row['images'])
