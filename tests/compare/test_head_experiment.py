import pytest

from timm_spinal.compare.head_experiment import FIRST_SEED, choose_recipe, recipe_grid
from timm_spinal.compare.train_head import Recipe, Trained
from timm_spinal.errors import UserError

TOPS = {(0.1, 0.): 80., (0.1, 1.): 85., (0.2, 0.): 85., (0.2, 1.): None}


def run(recipes, seeds):
    tops = [TOPS[recipe.lr, recipe.weight_decay] for recipe in recipes]
    return [[Trained(s, best={} if top1 is None else dict(top1=top1 + i), failure='nan' if top1 is None else '')
             for i, s in enumerate(seeds)] for top1 in tops]


def test_the_best_mean_is_taken_and_the_first_wins_a_tie():
    seen = []
    recipes = recipe_grid(Recipe(), [0.1, 0.2], [0., 1.])
    recipe, points = choose_recipe('spinal', recipes, lambda r, seeds: seen.append(seeds) or run(r, seeds), 2)
    assert (recipe.lr, recipe.weight_decay) == (0.1, 1.)
    assert [p['val_top1'] for p in points] == [80.5, 85.5, 85.5, None]
    assert [p['chosen'] for p in points] == [False, True, False, False]
    assert seen == [[FIRST_SEED, FIRST_SEED + 1]]


def test_failure_everywhere_is_told():
    with pytest.raises(UserError, match='training of spinal failed at every point'):
        choose_recipe('spinal', recipe_grid(Recipe(), [0.2], [1.]), run, 2)


def test_an_empty_grid_is_refused():
    with pytest.raises(UserError, match='the grid is empty'):
        recipe_grid(Recipe(), [], [0.])
