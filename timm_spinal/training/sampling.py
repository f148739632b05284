"""Which image comes when, and with which random seed.

Order and augmentation are functions of (seed, epoch, position in the epoch) alone: a sampler yields
``(index, seed)`` pairs and the data set seeds itself from the first pair of a batch. Nothing about the epoch lives in
the loader's workers, so batches are the same for any number of workers and after `accelerate.skip_first_batches`.
"""
import contextlib
import math
import random
from typing import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class TrainSampler(Sampler):
    """Shuffled ``(index, seed)`` pairs, another order and other seeds in every epoch.

    Accelerate calls ``set_epoch`` of a sampler with its own count of iterations, which a resumed run starts at zero;
    the epoch is therefore set by `begin_epoch`.

    Args:
        size: Number of images.
        seed: Random seed, the same in every process.
        aug_repeats: Times each chosen image comes in a row, every time augmented differently (Hoffer et al.,
            "Augment your batch", 2020); the epoch keeps its length, so it chooses ``size / aug_repeats`` images.
            Need not be whole. 0 and 1 are the same.
        length: Images of an epoch, when not None; any number.
    """

    def __init__(self, size: int, seed: int, aug_repeats: float = 0, length: int | None = None):
        self.size = size
        self.seed = seed
        self.aug_repeats = max(1., aug_repeats)
        self.length = size if length is None else length
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and seeds of the epoch's images, each (len(self),) of int64."""
        entropy = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(entropy)
        chosen = math.ceil(self.length / self.aug_repeats)
        passes = [torch.randperm(self.size, generator=generator) for _ in range(math.ceil(chosen / self.size))]
        place = (torch.arange(self.length) / self.aug_repeats).long()
        order = torch.cat(passes)[place]
        # 32 bits: what numpy's global generator takes as a seed
        return order, torch.randint(0, 2 ** 32, (self.length,), generator=generator)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, seeds = self.draw()
        return zip(order.tolist(), seeds.tolist())


def images_of_passes(size: int, epoch_repeats: float) -> int:
    """Images of an epoch of so many passes over ``size`` images; 0 passes are the same as 1."""
    return max(1, round(size * epoch_repeats)) if epoch_repeats > 0 else size


def epoch_length(images: int, batch: int, update: int, least_updates: int = 0) -> int:
    """Images that an epoch draws, so that a small data set loses none although every batch is full.

    An epoch of fewer than 100 batches is filled up to a whole batch, with images that it has seen already. From 100
    on the last incomplete batch, less than 1 % of the images, is dropped, as in timm.

    Args:
        images: Images that the epoch is to see.
        batch: Images of a step, over all processes.
        update: Images of an update: the same, or a multiple of it where gradients are accumulated.
        least_updates: Updates that the epoch has at least.
    """
    length = images if images >= 100 * batch else -(-images // batch) * batch
    return max(length, least_updates * update)


class EvalSampler(Sampler):
    """Every image once and in order, as ``(index, None)``: nothing random to seed."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, None]]:
        return ((index, None) for index in range(self.size))


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices so that every class gives the same part to the second half.

    Args:
        labels: Class of each image, (N,).
        fraction: Part of each class that goes to the second half, rounded; a class of two or more keeps at least one
            image on either side.
        seed: Random seed.

    Returns:
        Two sorted index arrays that together hold each of 0 .. N-1 once.
    """
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(fraction * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        held.append(members[order[:count]])
    second = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), second), second


def seed_rng(seed: int) -> None:
    """Seed the three global generators of the CPU; ``seed`` is below 2^32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also seeds every accelerator


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the three global generators of the CPU back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
