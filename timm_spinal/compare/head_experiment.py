"""One head of a comparison on frozen features: what it is trained with, and its run folders."""
import hashlib
import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal.cost import count_params
from timm_spinal.errors import UserError
from timm_spinal.evaluation.predictions import PREDICTIONS, Predictions
from timm_spinal.training.model import fit_momentum
from timm_spinal.training.report import hardware, versions, write_table, write_text

from .controls import Variant, new_head, new_heads, slug
from .fitted import Point, fit
from .options import FrozenConfig
from .runs import ERROR, RESULT, SUMMARY, read_json, read_result, run_folder, write_json
from .train_head import Features, Recipe, Trained, evaluate
from .train_heads import HeadTask, predict, predict_by, train_heads

FIRST_SEED = 10 ** 6  # tuning has seeds of its own: no reported run has taken part in the choice


class HeadExperiment:
    """Trains one variant on cached features and writes its run folders."""

    def __init__(
            self,
            config: FrozenConfig,
            variant: Variant,
            num_classes: int,
            data: dict[str, Features],
            identity: dict[str, Any],
            output: Path,
            recipe: Recipe,
    ):
        self.config = config
        self.variant = variant
        self.num_classes = num_classes
        self.data = data
        self.output = output
        self.in_features = channels(data['train'].x.shape[2:])
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.recipe = recipe

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Settings of a run; a finished run with other settings is trained again."""
        return dict(
            features=self.identity, head=self.variant.head, options=self.variant.options, recipe=asdict(recipe),
            matmul_precision=self.config.matmul_precision)

    def model(self) -> nn.Module:
        """A classifier of the variant, to measure its cost."""
        return new_head(self.variant, self.in_features, self.num_classes)

    def task(self, recipe: Recipe, seeds: list[int]) -> HeadTask:
        """The variant with some seeds."""
        return HeadTask(
            partial(self._new_heads, recipe), seeds, self.data['train'], self.data['validation'], recipe)

    def _new_heads(self, recipe: Recipe, seeds: list[int]) -> list[nn.Module]:
        heads = new_heads(self.variant, self.in_features, self.num_classes, seeds)
        updates = recipe.epochs * max(1, self.data['train'].x.shape[1] // recipe.batch_size)
        for head in heads:
            fit_momentum(head, updates, self.variant.options)
        return heads

    def tune(self, recipes: list[Recipe]) -> list[dict[str, Any]]:
        """Choose the recipe and return all points of the grid.

        An earlier choice from the same grid on the same features is read from ``tune.json`` instead.
        """
        path = self.output / 'runs' / slug(self.variant.name) / 'tune.json'
        settings = dict(grid=[self.settings(recipe) for recipe in recipes], seeds=self.config.tune_seeds)
        earlier = read_json(path)
        if earlier and earlier['settings'] == settings:
            points = earlier['points']
            self.recipe = recipes[[point['chosen'] for point in points].index(True)]
            return points
        self.recipe, points = choose_recipe(self.variant.name, recipes, self._train, self.config.tune_seeds)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(settings=settings, points=points))
        return points

    def _train(self, recipes: list[Recipe], seeds: list[int]) -> list[list[Trained]]:
        results: list[list[Trained]] = [[] for _ in recipes]
        for i, trained in train_heads([self.task(recipe, seeds) for recipe in recipes]):
            results[i].append(trained)
        return results

    def unfinished(self, seeds: list[int]) -> list[int]:
        """Seeds without a finished run of these settings."""
        settings = self.settings(self.recipe)
        return [seed for seed in seeds if (read_result(self._folder(seed)) or {}).get('settings') != settings]

    def describe(self, seeds: list[int]) -> str:
        """A line of results, with the seconds of training of all seeds."""
        results = [read_result(self._folder(seed)) or {} for seed in seeds]
        shown = ', '.join(f'{result["test_top1"]:.2f}' if result else 'failed' for result in results)
        seconds = sum(result.get('seconds', 0.) for result in results)
        return f'{self.variant.name}: test top-1 % {shown}, {seconds:.1f} s'

    def write(self, trained: Trained) -> None:
        """Read the test split once for a trained seed and write its run folder."""
        folder = self._new_folder(trained.seed)
        write_table(folder / SUMMARY, trained.history)
        if trained.failure:
            write_text(folder / ERROR, trained.failure)
            return
        head = self.model()
        self._write_result(
            trained.seed, predict(head, trained.state, self.data['test']), trained.best,
            epochs=self.recipe.epochs, best_epoch=trained.best_epoch, seconds=trained.seconds,
            params=count_params(head), lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)

    def _new_folder(self, seed: int) -> Path:
        folder = self._folder(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, ERROR, PREDICTIONS, SUMMARY):
            (folder / name).unlink(missing_ok=True)
        return folder

    def _write_result(self, seed: int, logits: torch.Tensor, validation: dict[str, float], **result: Any) -> None:
        """Write the predictions of the test split, and ``result.json``."""
        folder, test = self._folder(seed), self.data['test']
        predictions = Predictions()
        predictions.add(logits, test.y)
        predictions.write(folder)
        write_json(folder / RESULT, dict(
            model=self.config.backbone, variant=self.variant.name, seed=seed,
            top1=validation['top1'], loss=validation['loss'],
            test_top1=100. * float((logits.argmax(dim=1) == test.y).double().mean()),
            test_loss=float(F.cross_entropy(logits.double(), test.y)), **result, num_classes=self.num_classes,
            train_size=len(self.data['train'].y), eval_size=len(self.data['validation'].y), test_size=len(test.y),
            hardware=hardware(test.y.device, 1), versions=versions(), settings=self.settings(self.recipe),
        ))

    def _folder(self, seed: int) -> Path:
        return run_folder(self.output, self.variant.name, seed)


class FittedExperiment(HeadExperiment):
    """Fits a control on cached features once, and writes the result into the run folder of every seed.

    Args:
        grid: From `fitted.settings_grid`.
    """

    def __init__(self, *args: Any, grid: list[Point]):
        super().__init__(*args)
        self.grid = grid
        self.fitted: nn.Module | None = None

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return dict(features=self.identity, head=self.variant.head, grid=self.grid)

    def describe(self, seeds: list[int]) -> str:
        result = read_result(self._folder(seeds[0])) or {}
        return f'{self.variant.name}: test top-1 % {result["test_top1"]:.2f}, fitted in {result["seconds"]:.1f} s'

    def model(self) -> nn.Module:
        if self.fitted is None:  # finished runs keep the settings, not the classifier
            self.fitted = fit(self.variant.head, self.data['train'], self.num_classes, self.grid).model
        return self.fitted

    def fit(self, seeds: list[int]) -> None:
        """Fit, read the test split once, and write the run folders of some seeds."""
        start = time.perf_counter()
        choice = fit(self.variant.head, self.data['train'], self.num_classes, self.grid)
        seconds, self.fitted = time.perf_counter() - start, choice.model
        validation = evaluate(choice.model, self.data['validation'])
        logits = predict_by(choice.model, self.data['test'])
        for seed in seeds:
            self._new_folder(seed)
            self._write_result(
                seed, logits, validation, seconds=seconds, params=count_params(choice.model),
                chosen=choice.settings, tried=choice.points)


def channels(shape: Sequence[int]) -> int:
    """Channels of the features of one image: a vector (F,), a map (C, H, W) or tokens (T, C)."""
    return shape[-1] if len(shape) == 2 else shape[0]


def run_experiments(experiments: Sequence[HeadExperiment], seeds: list[int]) -> None:
    """Run what is not finished: fitted controls first, then all heads and seeds side by side; each run folder is
    written as its run ends."""
    todo = [experiment.unfinished(seeds) for experiment in experiments]
    trained_ones = []
    for experiment, left in zip(experiments, todo):
        if not isinstance(experiment, FittedExperiment):
            trained_ones.append((experiment, experiment.task(experiment.recipe, left)))
        elif left:
            experiment.fit(left)
    for i, trained in train_heads([task for _, task in trained_ones]):
        trained_ones[i][0].write(trained)
    for experiment, left in zip(experiments, todo):
        already = f' ({len(seeds) - len(left)} were there already)' if len(left) < len(seeds) else ''
        print(experiment.describe(seeds) + already, flush=True)


# ---- learning rate and weight decay, chosen on the validation split ----------------------------------------------


def recipe_grid(recipe: Recipe, rates: list[float], decays: list[float]) -> list[Recipe]:
    """Every learning rate with every weight decay.

    Raises:
        UserError: An empty grid.
    """
    if not rates or not decays:
        raise UserError('--tune: the grid is empty; give --tune-lr and --tune-weight-decay at least one value each')
    return [replace(recipe, lr=lr, weight_decay=decay) for lr in rates for decay in decays]


def choose_recipe(
        name: str,
        recipes: list[Recipe],
        run: Callable[[list[Recipe], list[int]], list[list[Trained]]],
        seeds: int,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with the best mean validation accuracy, and all points for the report; the first one wins a tie.

    Args:
        name: Variant, for the error.
        recipes: From `recipe_grid`.
        run: Trains the variant with some recipes, each for some seeds.
        seeds: Number of seeds of each point.

    Raises:
        UserError: Training failed at every point.
    """
    points: list[dict[str, Any]] = []
    for recipe, runs in zip(recipes, run(recipes, [FIRST_SEED + i for i in range(seeds)])):
        failed = any(trained.failure or not trained.best for trained in runs)
        top1 = None if failed else sum(trained.best['top1'] for trained in runs) / len(runs)
        points.append(dict(lr=recipe.lr, weight_decay=recipe.weight_decay, val_top1=top1, chosen=False))
    return recipes[mark_best(name, points)], points


def mark_best(name: str, points: list[dict[str, Any]]) -> int:
    """Mark the best point as chosen and return its index.

    Raises:
        UserError: No point has an accuracy.
    """
    tops = [point['val_top1'] for point in points]
    known = [top1 for top1 in tops if top1 is not None]
    if not known:
        raise UserError(f'--tune: training of {name} failed at every point of the grid; use lower learning rates')
    best = tops.index(max(known))
    points[best]['chosen'] = True
    return best
