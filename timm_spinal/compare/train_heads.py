"""Train several heads on cached features, each with several seeds, on all cores."""
import copy
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Sequence

import torch
from torch import nn

from timm_spinal.errors import UserError

from .controls import REFUSALS
from .train_head import Features, Recipe, Trained, eval_batch, seed_dropout, train_head


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

    def dry_run(self, name: str) -> None:
        """Make two updates, whose result is thrown away.

        Args:
            name: Of the head, for the message.

        Raises:
            UserError: A head, batch or optimizer with which it fails.
        """
        short = replace(self, seeds=[0], recipe=replace(self.recipe, epochs=2))
        try:
            for job in short.jobs():
                job.run_seeded()
        except REFUSALS as e:
            if isinstance(e, UserError):
                raise
            reason = ' '.join(str(e).split())[:300] or type(e).__name__
            raise UserError(f'head {name}: cannot be trained on features of {tuple(self.train.x.shape[2:])} in batches '
                            f'of {self.recipe.batch_size} ({reason}); change its options, or --head-batch-size') from e

    def jobs(self, index: int = 0) -> list['_Job']:
        """A job for each seed; ``index`` is that of the task."""
        device = self.train.x.device
        return [_Job(index, self, seed, head.to(device)) for seed, head in zip(self.seeds, self.new_heads(self.seeds))]


def check_batch(size: int, batch: int) -> None:
    """Refuse batches that no update can be made of.

    Raises:
        UserError: Fewer training features than one batch.
    """
    if size < batch:
        raise UserError(f'--head-batch-size {batch}: is larger than the {size} training images; '
                        f'use --head-batch-size {size} or less')


def train_heads(tasks: Sequence[HeadTask]) -> Iterator[tuple[int, Trained]]:
    """Train every task with every seed; each keeps its best epoch on the validation split.

    On a CPU each trains on a core of its own, the longest first, so that no core waits for the last one. Heads on
    another device follow one by one, and so do those that draw from torch's global generator, which all threads share:
    the result of a seed depends neither on the other seeds nor on the number of cores.

    Yields:
        Index of the task and the result of one of its seeds, as they end.

    Raises:
        UserError: Fewer training features than one batch, or an unknown optimizer.
    """
    for task in tasks:
        task.check()
    in_threads: list[_Job] = []
    one_by_one: list[_Job] = []
    for i, task in enumerate(tasks):
        if jobs := task.jobs(i):
            (in_threads if jobs[0].can_run_in_thread() else one_by_one).extend(jobs)
    with one_core_each() as pool:
        futures = [pool.submit(job.run) for job in sorted(in_threads, key=_Job.work, reverse=True)]
        for future in as_completed(futures):
            yield future.result()
    for job in one_by_one:
        yield job.run_seeded()


@contextmanager
def one_core_each() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each of which computes with one; torch has its threads back at the end."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Job:
    """One head with one seed."""
    index: int
    task: HeadTask
    seed: int
    head: nn.Module

    def work(self) -> int:
        """Grows with the time that the job takes."""
        return sum(p.numel() for p in self.head.parameters()) * self.task.recipe.epochs * len(self.task.train.y)

    def run(self) -> tuple[int, Trained]:
        task = self.task
        return self.index, train_head(self.head, self.seed, task.train, task.validation, task.recipe)

    def run_seeded(self) -> tuple[int, Trained]:
        """`run` with torch's global generators seeded; they are afterwards as they were."""
        with torch.random.fork_rng(devices=_gpus(self.task.train.x.device)):
            torch.manual_seed(self.seed)
            return self.run()

    def can_run_in_thread(self) -> bool:
        """Whether it is on a CPU, and a training step draws nothing from torch's global generator."""
        x = self.task.train.x
        if x.device.type != 'cpu':
            return False
        head = copy.deepcopy(self.head).train()
        seed_dropout(head, self.seed)
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            head(x[0, :16])
            return torch.equal(before, torch.get_rng_state())


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == 'cuda' else []


@torch.no_grad()
def predict(head: nn.Module, state: dict[str, torch.Tensor], features: Features) -> torch.Tensor:
    """Logits (N, C) of a trained head for features (1, N, ...)."""
    head.load_state_dict(state)
    return predict_by(head.to(features.x.device), features)


@torch.no_grad()
def predict_by(model: nn.Module, features: Features) -> torch.Tensor:
    """Logits (N, C) of a classifier for features (1, N, ...) on its device."""
    model.eval()
    return torch.cat([model(x) for x in features.x[0].split(eval_batch(features.x))])
