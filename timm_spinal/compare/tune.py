"""Learning rate and weight decay of each variant, from the same small grid, on the validation split."""
from dataclasses import replace
from typing import Any, Callable

from timm_spinal.errors import UserError

from .train_head import Recipe, Trained

FIRST_SEED = 10 ** 6  # seeds of their own, so that no reported run has been chosen among

Point = dict[str, Any]


def grid(recipe: Recipe, rates: list[float], decays: list[float]) -> list[Recipe]:
    """Every learning rate with every weight decay.

    Raises:
        UserError: An empty grid.
    """
    if not rates or not decays:
        raise UserError('--tune: the grid is empty; give --tune-lr and --tune-weight-decay at least one value each')
    return [replace(recipe, lr=lr, weight_decay=decay) for lr in rates for decay in decays]


def choose(
        name: str,
        recipes: list[Recipe],
        run: Callable[[list[Recipe], list[int]], list[list[Trained]]],
        seeds: int,
) -> tuple[Recipe, list[Point]]:
    """The recipe with the best mean validation accuracy, and all points for the report; the first one wins a tie.

    Args:
        name: Variant, for the error.
        recipes: From `grid`.
        run: Trains the variant with some recipes, each for some seeds.
        seeds: Number of seeds of each point.

    Raises:
        UserError: Training failed at every point.
    """
    points: list[Point] = []
    for recipe, found in zip(recipes, run(recipes, [FIRST_SEED + i for i in range(seeds)])):
        failed = any(trained.failure or not trained.best for trained in found)
        top1 = None if failed else sum(trained.best['top1'] for trained in found) / len(found)
        points.append(dict(lr=recipe.lr, weight_decay=recipe.weight_decay, val_top1=top1, chosen=False))
    return recipes[mark_best(name, points)], points


def mark_best(name: str, points: list[Point]) -> int:
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
