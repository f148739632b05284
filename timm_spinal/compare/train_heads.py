"""Train one head on cached features, the seeds of it together or side by side where that is exact."""
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import torch
from torch import nn

from timm_spinal.errors import UserError

from .feature_linear import skip_feature_gradients
from .stacked import SeparateHeads, StackedHeads, can_stack
from .train_group import EVAL_BATCH, Features, Recipe, Trained, train_group

# optimizers whose update of a number depends on nothing but that number's own gradients
ELEMENTWISE = ('sgd', 'momentum', 'adam', 'adamw', 'nadam', 'nadamw', 'radam', 'radamw', 'rmsprop', 'adagrad', 'lion')


def train_heads(
        new_heads: Callable[[list[int]], list[nn.Module]],
        seeds: list[int],
        train: Features,
        validation: Features,
        recipe: Recipe,
        stack: bool | None = None,
) -> list[Trained]:
    """Train a head for each seed and keep its best epoch on the validation split.

    A seed decides on initial weights, order of the images, pass of each image and dropout. The order is the same for
    every head of that seed, and the trainer's own.

    Args:
        new_heads: Makes the heads of some seeds, on the CPU.
        seeds: Random seeds.
        train: Features to train on; computation is on their device.
        validation: Features (1, N, ...) to choose the epoch by.
        recipe: How to train.
        stack: Train the seeds together; None: where `can_stack` finds it exact, but side by side on a CPU.

    Raises:
        UserError: Fewer training features than one batch, or an unknown optimizer.
    """
    size = train.x.shape[1]
    if size < recipe.batch_size:
        raise UserError(f'--head-batch-size {recipe.batch_size}: there are {size} training images, not one full batch; '
                        f'use --head-batch-size {size} or less')
    if stack is None and train.x.device.type == 'cpu':  # a core to each seed is faster there than a stack
        return _train_side_by_side(new_heads, seeds, train, validation, recipe)
    if stack is None:
        stack = len(seeds) > 1 and recipe.opt in ELEMENTWISE and _stackable(new_heads, seeds[:2], train)
    groups = [seeds] if stack else [[seed] for seed in seeds]
    kind = StackedHeads if stack else SeparateHeads
    results: list[Trained] = []
    for group_seeds in groups:
        heads = [head.to(train.x.device) for head in new_heads(group_seeds)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(group_seeds[0])
            results += train_group(kind(heads, group_seeds), group_seeds, train, validation, recipe)
    return results


def _train_side_by_side(
        new_heads: Callable[[list[int]], list[nn.Module]],
        seeds: list[int],
        train: Features,
        validation: Features,
        recipe: Recipe,
) -> list[Trained]:
    """As `train_heads`, each seed on its own core. Seeds without a partner, and heads that draw from torch's global
    generator, which all threads share, have all cores to themselves."""
    heads, threads = dict(zip(seeds, new_heads(seeds))), torch.get_num_threads()
    sample = train.x[0, :min(16, len(train.y))]
    alone = _draws_from_global(heads[seeds[0]], sample)

    def run(seed: int) -> Trained:
        if train.x.ndim == 3:
            skip_feature_gradients(heads[seed], sample)
        return train_group(SeparateHeads([heads[seed]], [seed]), [seed], train, validation, recipe)[0]

    paired = 0 if alone else len(seeds) - len(seeds) % threads
    results: list[Trained] = []
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results += pool.map(run, seeds[:paired])
    finally:
        torch.set_num_threads(threads)
    for seed in seeds[paired:]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(run(seed))
    return results


def _draws_from_global(head: nn.Module, x: torch.Tensor) -> bool:
    """Whether a training step of a head, other than its dropout modules, draws from torch's global generator."""
    group = SeparateHeads([copy.deepcopy(head)], [0])
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        group.forward_train(x[None])
        return not torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def predict(head: nn.Module, state: dict[str, torch.Tensor], features: Features) -> torch.Tensor:
    """Logits (N, C) of a trained head for features (1, N, ...)."""
    head.load_state_dict(state)
    head.to(features.x.device).eval()
    return torch.cat([head(x) for x in features.x[0].split(EVAL_BATCH)])


def _stackable(new_heads: Callable[[list[int]], list[nn.Module]], seeds: list[int], train: Features) -> bool:
    heads = [head.to(train.x.device) for head in new_heads(seeds)]
    rows = min(16, train.x.shape[1] // 2)
    x = torch.stack([train.x[0, i * rows:(i + 1) * rows] for i in range(len(seeds))])
    return can_stack(heads, seeds, x)
