"""Options of a comparison on frozen features. Data, backbone and augmentation are the trainer's own options."""
import dataclasses
from dataclasses import dataclass
from typing import Any

from timm_spinal.errors import UserError
from timm_spinal.training.config import (
    AugmentOptions,
    DataOptions,
    LoaderOptions,
    MixOptions,
    ModelOptions,
    TrainConfig,
)
from timm_spinal.training.options import Options, option, to_flag

from .train_head import Recipe

BATCH_SIZE, MIN_UPDATES, MOST_SEEDS = 512, 16, 1000


@dataclass
class CompareOptions(Options, applies_to=('frozen',)):
    """Comparison on frozen features"""
    backbone: str = option('', 'model of timm or timm_spinal that makes the features; its classifier is left out')
    heads: str = option(
        'linear,mlp,spinal,pspinal', 'heads, separated by commas, with options after colons (spinal:width=256); mlp '
        'stands for one MLP for each other head, with as many parameters; mlp=spinal is only that of spinal; ridge, '
        'knn and logreg are controls that are fitted and not trained')
    seeds: str = option('5', 'number of seeds, or the seeds themselves separated by commas')
    control: str = option('linear', 'head that the others are compared with')
    epochs: int = option(30, 'epochs of each head', low=1)
    head_batch_size: int = option(
        0, f'features per update of a head; 0: {BATCH_SIZE}, or fewer for {MIN_UPDATES} updates an epoch', low=0)
    opt: str = option('adamw', 'optimizer of the heads, any of timm')
    lr: float = option(1e-3, 'highest learning rate of the heads (cosine schedule)', low=0.)
    weight_decay: float = option(1e-2, 'weight decay of the heads', low=0.)
    warmup_epochs: float = option(1., 'epochs of linear warm-up', low=0.)
    smoothing: float = option(0., 'label smoothing', low=0., high=1.)
    tune: bool = option(False, 'choose lr and weight decay of each head on the validation split, from the grid below')
    tune_lr: list[float] = option([3e-4, 2e-3, 1e-2], 'learning rates of the grid', low=0.)
    tune_weight_decay: list[float] = option([1e-2, 3e-1], 'weight decays of the grid', low=0.)
    tune_seeds: int = option(2, 'seeds of each point of the grid', low=1)
    ridge_penalty: list[float] = option(
        [], 'penalties of ridge regression to choose from, in units of the mean eigenvalue of the features; not given: '
        '1e-6 to 100', greater_than=0.)
    knn_k: list[int] = option([], 'numbers of neighbours of knn to choose from; not given: 5 to 200', low=1)
    knn_temperature: list[float] = option(
        [], 'temperatures of the votes of knn to choose from; not given: 0.07, 0.1 and 0.2', greater_than=0.)
    logreg_c: list[float] = option(
        [], "weights C of the data in logistic regression to choose from, scikit-learn's for features of mean variance "
        '1; not given: 1e-5 to 10', greater_than=0.)
    augment_passes: int = option(0, 'further passes over the training images, augmented', low=0)
    train_size: int = option(0, 'train on a stratified part of so many images, when above 0', low=0)
    test_split_fraction: float = option(
        0.2, 'part of each class that becomes the test split of a folder without any splits', low=0.01, high=0.9)
    matmul_precision: str = option(
        'highest', "torch's precision of float32 products while heads train; 'medium' is faster on some devices",
        choices=('highest', 'high', 'medium'))
    features: str = option('', 'folder of the features; not given: features/ in the output folder')
    rebuild: bool = option(False, 'compute the features again')
    per_class: bool = option(False, 'write per_class.csv, the test accuracy of each class')
    calibration: bool = option(False, 'draw calibration.png and give the calibration error')
    output: str = option('', 'folder of the comparison; not given: output/compare/MODEL')


@dataclass
class FrozenConfig(
        CompareOptions,
        LoaderOptions,
        MixOptions,
        AugmentOptions,
        ModelOptions,
        DataOptions,
        command='frozen',
):
    """Everything that a comparison on frozen features depends on."""

    def recipe(self, train_size: int) -> Recipe:
        """How each head is trained on so many images, before tuning."""
        batch_size = self.head_batch_size or max(1, min(BATCH_SIZE, train_size // MIN_UPDATES))
        return Recipe(
            epochs=self.epochs, batch_size=batch_size, opt=self.opt, lr=self.lr,
            weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs, smoothing=self.smoothing)


def check_frozen(config: FrozenConfig) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        UserError: No backbone, or an option that has no effect here.
    """
    if not config.backbone:
        raise UserError('no backbone: give one with --backbone, for instance --backbone resnet50 --pretrained')
    if config.dataset == 'multimnist':
        raise UserError('--dataset multimnist: its images have two classes each; a sweep can compare models on them, '
                        'but not heads on frozen features; use --sweep')
    defaults = FrozenConfig()
    for f in dataclasses.fields(config):
        if 'frozen' not in f.metadata['applies_to'] and getattr(config, f.name) != getattr(defaults, f.name):
            reason = f.metadata['not_frozen']
            raise UserError(f'{to_flag(f.name)}: has no effect on a frozen backbone ({reason}); leave it out')


def as_train_config(config: FrozenConfig, **changes: Any) -> TrainConfig:
    """The trainer's view of data, backbone and augmentation."""
    shared = {f.name for f in dataclasses.fields(TrainConfig)} - {f.name for f in dataclasses.fields(CompareOptions)}
    given = {k: v for k, v in vars(config).items() if k in shared}
    return TrainConfig(**{**given, 'model': config.backbone, **changes})


def parse_seeds(text: str | int | list[int], where: str = '--seeds') -> list[int]:
    """Seeds from a number of them ('5', which means 0 to 4) or a list ('3,7,11').

    Raises:
        UserError: An empty list, a repeated seed, or no whole numbers.
    """
    try:
        if isinstance(text, (list, tuple)):
            seeds = [int(seed) for seed in text]
        elif ',' in str(text):
            seeds = [int(part) for part in str(text).split(',') if part.strip()]
        else:
            count = int(text or 0)
            seeds = list(range(min(count, MOST_SEEDS + 1)))
    except (TypeError, ValueError) as e:
        raise UserError(f'{where} {text}: not a number of seeds; write 5, or the seeds themselves as 3,7,11') from e
    if len(seeds) > MOST_SEEDS or max(seeds, default=0) >= 2 ** 32:
        raise UserError(f'{where} {str(text):.40}: too large; give at most {MOST_SEEDS} seeds, each below {2 ** 32}')
    if not seeds or min(seeds) < 0:
        raise UserError(f'{where} {text!r}: an empty list of seeds; write 5 for the seeds 0 to 4'
                        if not seeds else f'{where} {text}: seeds must not be negative')
    if len(set(seeds)) < len(seeds):
        raise UserError(f'{where} {text}: a seed is given twice, so its result would count twice; remove one')
    return seeds
