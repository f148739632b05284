"""Train heads on cached features, each with its seeds: side by side or together, where that is exact."""
import copy
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Sequence

import torch
from torch import nn

from timm_spinal.errors import UserError

from .controls import REFUSALS
from .cores import core_each
from .joined_linear import join_linears
from .products import fast_float32_products
from .stacked import SeparateHeads, StackedHeads, can_stack
from .train_group import EVAL_BATCH, Features, Recipe, Trained, train_group

# optimizers whose update of a number depends on nothing but that number's own gradients
ELEMENTWISE = ('sgd', 'momentum', 'adam', 'adamw', 'nadam', 'nadamw', 'radam', 'radamw', 'rmsprop', 'adagrad', 'lion')


@dataclass(frozen=True)
class HeadTask:
    """One head to train with one recipe and some seeds.

    A seed decides on initial weights, order of the images, pass of each image and dropout. The order is the same for
    every head of that seed, and the trainer's own.

    Attributes:
        new_heads: Makes the heads of some seeds, on the CPU.
        seeds: Random seeds.
        train: Features to train on; computation is on their device.
        validation: Features (1, N, ...) to choose the epoch by.
        recipe: How to train.
    """
    new_heads: Callable[[list[int]], list[nn.Module]]
    seeds: list[int]
    train: Features
    validation: Features
    recipe: Recipe

    def check(self) -> None:
        """Refuse batches that no update can be made of.

        Raises:
            UserError: Fewer training features than one batch.
        """
        check_batch(self.train.x.shape[1], self.recipe.batch_size)

    def try_out(self, name: str) -> None:
        """Make two updates, whose result is thrown away.

        Args:
            name: Of the head, for the message.

        Raises:
            UserError: A head, batch or optimizer with which it fails.
        """
        group = SeparateHeads([head.to(self.train.x.device) for head in self.new_heads([0])], [0])
        try:
            with torch.random.fork_rng(devices=[]):
                train_group(group, [0], self.train, self.validation, replace(self.recipe, epochs=2))
        except REFUSALS as e:
            if isinstance(e, UserError):
                raise
            reason = ' '.join(str(e).split())[:300] or type(e).__name__
            raise UserError(f'head {name}: cannot be trained on features of {tuple(self.train.x.shape[2:])} in batches '
                            f'of {self.recipe.batch_size} ({reason}); change its options, or --head-batch-size') from e


def check_batch(size: int, batch: int) -> None:
    """Refuse batches that no update can be made of.

    Raises:
        UserError: Fewer training features than one batch.
    """
    if size < batch:
        raise UserError(f'--head-batch-size {batch}: there are {size} training images, not one full batch; '
                        f'use --head-batch-size {size} or less')


def train_heads(tasks: Sequence[HeadTask], stack: bool | None = None) -> Iterator[tuple[int, Trained]]:
    """Train all tasks; each seed keeps its best epoch on the validation split.

    Args:
        tasks: What to train.
        stack: Train the seeds of a task together; None: where `can_stack` finds it exact, but side by side on a CPU.

    Yields:
        Index of the task and the result of one of its seeds, as they end.

    Raises:
        UserError: Fewer training features than one batch, or an unknown optimizer.
    """
    for task in tasks:
        task.check()
    beside = [stack is None and task.train.x.device.type == 'cpu' for task in tasks]  # a core each is faster there
    yield from _train_side_by_side([(i, task) for i, task in enumerate(tasks) if beside[i]])
    for i, task in enumerate(tasks):
        if not beside[i]:
            yield from ((i, trained) for trained in _train_together(task, stack))


def _train_together(task: HeadTask, stack: bool | None) -> Iterator[Trained]:
    seeds, device = task.seeds, task.train.x.device
    if stack is None:
        stack = len(seeds) > 1 and task.recipe.opt in ELEMENTWISE and _stackable(task)
    kind = StackedHeads if stack else SeparateHeads
    for group_seeds in [seeds] if stack else [[seed] for seed in seeds]:
        heads = [head.to(device) for head in task.new_heads(group_seeds)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(group_seeds[0])
            yield from train_group(kind(heads, group_seeds), group_seeds, task.train, task.validation, task.recipe)


@dataclass(frozen=True)
class _Job:
    """One head with one seed."""
    index: int
    task: HeadTask
    seed: int
    group: SeparateHeads

    def sample(self) -> torch.Tensor:
        return self.task.train.x[0, :min(16, len(self.task.train.y))]

    def work(self) -> int:
        """Grows with the time that the job takes."""
        return sum(p.numel() for p, _ in self.group.parameters()) * self.task.recipe.epochs * len(self.task.train.y)

    def run(self) -> tuple[int, Trained]:
        task = self.task
        return self.index, train_group(self.group, [self.seed], task.train, task.validation, task.recipe)[0]


def _train_side_by_side(tasks: list[tuple[int, HeadTask]]) -> Iterator[tuple[int, Trained]]:
    """Every seed of every task on a core of its own, the longest first, so that no core waits for the last one.

    Heads that draw from torch's global generator, which all threads share, follow alone.
    """
    paired: list[_Job] = []
    alone: list[_Job] = []
    for i, task in tasks:
        jobs = [_Job(i, task, seed, SeparateHeads([head], [seed]))
                for seed, head in zip(task.seeds, task.new_heads(task.seeds))]
        if task.train.x.ndim == 3:
            for job in jobs:
                job.group.heads = [join_linears(job.group.heads[0], job.sample())]
        (alone if jobs and _draws_from_global(jobs[0]) else paired).extend(jobs)
    with fast_float32_products(), core_each() as pool:
        futures = [pool.submit(job.run) for job in sorted(paired, key=_Job.work, reverse=True)]
        for future in as_completed(futures):
            yield future.result()
    for job in alone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            yield job.run()


def _draws_from_global(job: _Job) -> bool:
    """Whether a training step of a head, other than its dropout modules, draws from torch's global generator."""
    group = copy.deepcopy(job.group)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        group.forward_train(job.sample()[None])
        return not torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def predict(head: nn.Module, state: dict[str, torch.Tensor], features: Features) -> torch.Tensor:
    """Logits (N, C) of a trained head for features (1, N, ...)."""
    head.load_state_dict(state)
    head.to(features.x.device).eval()
    return torch.cat([head(x) for x in features.x[0].split(EVAL_BATCH)])


def _stackable(task: HeadTask) -> bool:
    seeds, x = task.seeds[:2], task.train.x
    heads = [head.to(x.device) for head in task.new_heads(seeds)]
    rows = min(16, x.shape[1] // 2)
    return can_stack(heads, seeds, torch.stack([x[0, i * rows:(i + 1) * rows] for i in range(len(seeds))]))
