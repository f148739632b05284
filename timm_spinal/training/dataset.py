"""The splits of a data set as the loader sees them: decoded and transformed images, in an order, from random seeds.

Order and augmentation are functions of (seed, epoch, position in the epoch) alone: a sampler yields
``(index, seed)`` pairs and the data set seeds itself from the first pair of a batch. Nothing about the epoch lives in
the loader's workers, so batches are the same for any number of workers and after `accelerate.skip_first_batches`.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from timm_spinal.errors import UserError

from .batches import Finish, split_for_device
from .pixels import UNREADABLE, Decoder, open_image
from .transforms import preserved_rng, seed_rng, split_transform

SKIPPED_TARGET = -1  # label of an evaluation image that could not be read


class UnreadableImage(UserError):
    """An image that cannot be decoded; the message names it, on one line even out of a loader worker."""

    def __init__(self, message: str):
        # torch re-raises a worker's exception with the whole traceback as its text; our own line is the last of it
        super().__init__(message.strip().rsplit(f'{type(self).__name__}: ', 1)[-1])


@dataclass
class Split:
    """One split of a data set before any transform.

    Attributes:
        name: What error messages call it.
        dataset: timm's or torchvision's data set, without transforms.
        labels: Class of each image, (N,), or None where they are not known without reading the images.
        class_names: Names by index, or None where the data set has none.
        label_offset: Subtracted from the labels of `dataset` (not from `labels`), for sets that count from 1.
        indices: The part of `dataset` that belongs to the split; None is all of it.
        streamed: The images come from a stream, in an order of its own.
        multi_label: An image has several classes: `dataset` gives their memberships (C,), float32.
        passed_over: Counts and kinds of the files beside the images that were not taken, as text.
    """
    name: str
    dataset: Any
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    label_offset: int = 0
    indices: np.ndarray | None = None
    streamed: bool = False
    multi_label: bool = False
    passed_over: str = ''

    def __len__(self) -> int:
        return len(self.dataset) if self.indices is None else len(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle for a worker process that is not forked: without open tar files, it opens its own."""
        state = getattr(getattr(self.dataset, 'reader', None), 'tar_state', {})
        _forget_open_tars(state if isinstance(state, dict) else {'': state})
        return vars(self)

    def subset(self, indices: np.ndarray) -> 'Split':
        """The images with these numbers in the split."""
        labels = None if self.labels is None else self.labels[indices]
        inner = indices if self.indices is None else self.indices[indices]
        return replace(self, labels=labels, indices=inner)

    def number(self, index: int) -> int:
        """Number of an image of the split in `dataset`."""
        return index if self.indices is None else int(self.indices[index])

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """The image in the mode in which it is stored, and its class or the memberships of its classes."""
        index = self.number(index)
        if isinstance(self.dataset, ImageDataset):
            # around ImageDataset.__getitem__, which puts another image in the place of one it cannot read
            file, target = self.dataset.reader[index]
            with file:
                image = open_image(file)
        else:
            image, target = self.dataset[index]
            image.load()  # some of torchvision's data sets leave that to the first use
        if self.multi_label:
            return image, target
        return image, SKIPPED_TARGET if target is None else int(target) - self.label_offset

    def file_name(self, index: int) -> str:
        """Name of an image within the split, with its folders; its number where images have no names."""
        number = self.number(index)
        return str(self.dataset.filename(number)) if isinstance(self.dataset, ImageDataset) else f'number {number}'

    def describe(self, index: int) -> str:
        """What error messages call an image: its path, or its number."""
        index = self.number(index)
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index, absolute=True))
        return f'number {index} of {self.name}'


def _forget_open_tars(states: dict[str, Any]) -> None:
    """Drop the open files of timm's tar reader, those of tars in tars too."""
    for state in states.values():
        state.reset()
        _forget_open_tars(state.children)


class ImageData(Dataset):
    """Map-style split: ``data[index, seed]`` is a (C, H, W) tensor and a class, or a list of memberships.

    The transform draws from Python's, numpy's and torch's global generators (timm's and torchvision's use all three).
    They are seeded for each batch from the seed of its first image (None: left alone), not for each image, which would
    cost a fifth of the time of loading 28-pixel images; and put back afterwards, so that a loader without workers does
    not disturb the stream that dropout draws from.

    Args:
        split: The images.
        transform: From a PIL image to a tensor.
        decode: Gives the transform its images, in one mode; `Decoder()` when None.
        on_unreadable: 'raise'; 'replace' takes the next image that can be read; 'mark' gives zeros and
            `SKIPPED_TARGET`.
        on_device: Batches stay bytes, where the transform lets them be, and are left to `finish`.

    Attributes:
        finish: The rest of the transform, for batches; see `batches.split_for_device`.
        rows: When set, ``rows[i]``, with i the number of an image in ``split.dataset``, is a tensor that comes with
            the image, and batches have a third part.

    Raises:
        UnreadableImage: When on_unreadable is 'raise', or nothing near the image can be read either.
    """
    max_tries = 100

    def __init__(
            self,
            split: Split,
            transform: Callable,
            decode: Decoder | None = None,
            on_unreadable: str = 'raise',
            on_device: bool = False,
    ):
        self.split = split
        if on_device:
            self.transform, self.finish = split_for_device(transform)
        else:
            self.transform, normalize = split_transform(transform)
            self.finish = Finish(normalize)
        self.on_device = on_device
        self.decode = decode or Decoder()
        self.on_unreadable = on_unreadable
        self.rows: Any = None
        # shared with the workers: which images were found to be unreadable
        self.unreadable = torch.zeros(len(split), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, Any]:
        images, targets, *_ = self.collate(self.__getitems__([item]))
        return images[0], targets[0].tolist()

    def picture(self, index: int) -> Image.Image:
        """An image in the mode of the model, before the transform.

        Raises:
            UNREADABLE: Any of these.
        """
        return self.decode(self.split.read(index)[0], partial(self.split.describe, index))

    def collate(self, samples: list[tuple]) -> tuple[torch.Tensor, ...]:
        """Images (B, C, H, W), targets and rows of what `__getitems__` gives; the loader's ``collate_fn``.

        Targets are classes (B,), or memberships (B, classes).
        """
        images, targets, *rows = zip(*samples)
        batch = torch.stack(images)
        if not self.on_device:
            batch = self.finish.normalize(batch)
        return batch, torch.from_numpy(np.asarray(targets)), *map(torch.stack, rows)

    def __getitems__(self, items: list[tuple[int, int | None]]) -> list[tuple]:
        seed = items[0][1]
        if seed is None:
            return [self._get(index) for index, _ in items]
        with preserved_rng():
            seed_rng(seed)
            return [self._get(index) for index, _ in items]

    def _get(self, index: int) -> tuple:
        for step in range(self.max_tries):
            try:
                image, target = self.split.read(place := (index + step) % len(self))
                image = self.decode(image, partial(self.split.describe, place))
                break
            except UNREADABLE as e:
                self.unreadable[place] = 1
                if self.on_unreadable == 'mark':
                    image, target = Image.new(self.decode.mode, (32, 32)), SKIPPED_TARGET
                    break
                if self.on_unreadable == 'raise':
                    reason = ' '.join(str(e).split()) or type(e).__name__
                    raise UnreadableImage(
                        f'image {self.split.describe(place)} cannot be read ({reason}); repair or remove it, or add '
                        '--skip-unreadable') from e
        else:
            raise UnreadableImage(
                f'{self.max_tries} images in a row cannot be read from {self.split.describe(index)} on; '
                f'check the data')
        image = self.transform(image)
        sample = image, target, *self.finish.draw(image)
        return sample if self.rows is None else (*sample, self.rows[self.split.number(place)])


class StreamData(IterableDataset):
    """Streamed split (hfids/, wds/, tfds/): order is the reader's own, so a run can be resumed at epochs only.

    Augmentation is seeded by (seed, epoch, worker, count): reproducible with the same number of workers.
    """

    def __init__(self, split: Split, transform: Callable, decode: Decoder, seed: int, on_device: bool = False):
        self.split = split
        self.transform, self.finish = split_for_device(transform) if on_device else (transform, Finish())
        self.decode = decode
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # read by workers that outlive an epoch

    def begin_epoch(self, epoch: int) -> None:
        self.epoch[0] = epoch
        self.split.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        entropy = [self.seed, int(self.epoch), worker.id if worker else 0]
        seeds = np.random.default_rng(entropy)
        for image, target in self.split.dataset:
            image = self.decode(image, lambda: f'of {self.split.name}')
            with preserved_rng():
                seed_rng(int(seeds.integers(2 ** 32)))
                image = self.transform(image)
                sample = image, int(target), *self.finish.draw(image)
            yield sample


# ---- order ----------------------------------------------------------------------------------------------------------


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
