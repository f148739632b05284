"""Batches on their way to a device: copied as bytes beside the computation, normalised, erased and mixed there.

Nothing here waits for the device. What is drawn at random is drawn on the host and copied without waiting.
"""
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn as nn
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import recursively_apply, send_to_device
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from .transforms import split_transform


def pin_memory(loaders: Iterable[DataLoader], device: torch.device) -> None:
    """Have loaders that are not prepared yet make batches in pinned memory, from which a GPU copies by itself.

    Those of data that live on the device have nothing to pin.
    """
    for loader in loaders:
        loader.pin_memory |= device.type == 'cuda' and not getattr(loader.dataset, 'lives_on_device', False)


def on_device(loader: Any, device: torch.device) -> Iterator[tuple]:
    """The batches of a prepared loader on the device.

    On a GPU each is copied while the one before it is computed on: in a stream of its own, for which only the
    computation that needs the batch waits.
    """
    if device.type != 'cuda' or not isinstance(loader, DataLoaderShard):
        yield from loader
        return
    loader.device = None  # Accelerate would copy in the stream of the computation, behind all that is queued there
    stream = torch.cuda.Stream(device)
    for batch in loader:
        with torch.cuda.stream(stream):
            batch = send_to_device(batch, device, non_blocking=True)
        computation = torch.cuda.current_stream(device)
        computation.wait_stream(stream)
        recursively_apply(torch.Tensor.record_stream, batch, computation)  # its memory is kept until it was used
        yield batch


# ---- on the device ----------------------------------------------------------------------------------------------


class Erasing:
    """timm's `RandomErasing` in two: boxes are drawn on the host, image by image, and filled on the device.

    Args:
        erasing: Its probability, areas, counts and mode are taken.
    """

    def __init__(self, erasing: RandomErasing):
        self.per_pixel, self.rand_color = erasing.per_pixel, erasing.rand_color
        self.boxes = RandomErasing(
            erasing.probability, erasing.min_area, erasing.max_area, mode='const', min_count=erasing.min_count,
            max_count=erasing.max_count, device='cpu')
        self.boxes.log_aspect_ratio = erasing.log_aspect_ratio

    def draw(self, height: int, width: int) -> torch.Tensor:
        """Boxes (count, 4) as top, bottom, left and right; those that are not used are empty."""
        noted = _Noted()
        self.boxes._erase(noted, 1, height, width, torch.float32)
        boxes = torch.zeros(self.boxes.max_count, 4, dtype=torch.int32)
        if noted:
            boxes[:len(noted)] = torch.tensor(noted)
        return boxes

    def fill(self, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) with boxes (B, count, 4) erased, by draws of the device's own generator."""
        for place in boxes.unbind(1):
            if self.per_pixel:
                fill = torch.randn_like(images)
            else:
                fill = images.new_zeros(*images.shape[:2], 1, 1)
                fill = fill.normal_() if self.rand_color else fill
            images = torch.where(_inside(place, images), fill, images)
        return images


class _Noted(list):
    """An image that only notes which part of it is erased."""

    def __setitem__(self, place: Any, value: Any) -> None:
        _, rows, columns = place
        self.append([rows.start, rows.stop, columns.start, columns.stop])


class Finish:
    """The steps of a transform that are left for batches on the device; see `split_for_device`.

    Args:
        normalize: Bytes (B, C, H, W) to floats; not given: the images are floats already.
        erasing: Random erasing, or None.
    """

    def __init__(
            self,
            normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
            erasing: Erasing | None = None,
    ):
        self.normalize = normalize or nn.Identity()
        self.erasing = erasing

    def draw(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a batch needs for each image (C, H, W) beside its pixels: the boxes to erase, if any are erased."""
        return () if self.erasing is None else (self.erasing.draw(*image.shape[-2:]),)

    def __call__(self, images: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images as the model takes them, and what the loader gave beside them but boxes to erase."""
        images = self.normalize(images)
        if self.erasing is None:
            return images, *given
        boxes, *given_on = given
        return self.erasing.fill(images, boxes), *given_on


class Finished:
    """The batches of a loader, finished where they are; can be iterated again as the loader can."""

    def __init__(self, loader: DataLoader, finish: Finish):
        self.loader = loader
        self.finish = finish

    def __iter__(self) -> Iterator[tuple]:
        for images, target, *given in self.loader:
            yield self.finish(images, *given)[0], target


def split_for_device(transform: Callable) -> tuple[Callable, Finish]:
    """A training transform in two: an image to bytes in the loader, and batches of bytes to what a model takes.

    One that makes floats by steps of its own stays whole.
    """
    steps = list(getattr(transform, 'transforms', []))
    erasing = steps.pop() if steps and isinstance(steps[-1], RandomErasing) else None
    begin, normalize = split_transform(Compose(steps) if steps else transform)
    if isinstance(normalize, nn.Identity):
        return transform, Finish()
    return begin, Finish(normalize, None if erasing is None else Erasing(erasing))


class BatchMixup(Mixup):
    """timm's, of which the modes ``elem`` and ``pair`` mix all images of a batch at once.

    They draw and give what timm's give, which copies the factors to the device, and waits, and mixes image by image.
    """

    def _mix_elem(self, x: torch.Tensor) -> torch.Tensor:
        return self._mix_each(x, len(x))

    def _mix_pair(self, x: torch.Tensor) -> torch.Tensor:
        return self._mix_each(x, len(x) // 2)

    def _mix_each(self, x: torch.Tensor, drawn: int) -> torch.Tensor:
        lam, use_cutmix = self._params_per_elem(drawn)
        factor, boxes = np.where(use_cutmix, np.float32(1.), lam), np.zeros((drawn, 4), np.float32)
        for i in np.flatnonzero(use_cutmix & (lam != 1.)):
            boxes[i], lam[i] = cutmix_bbox_and_lam(
                x.shape[1:], lam[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam)
        rows = np.column_stack([lam, factor, boxes]).astype(np.float32)
        if drawn < len(x):  # the second half is the first in reverse
            rows = np.concatenate([rows, rows[::-1]])
        numbers = torch.from_numpy(rows)
        if x.device.type == 'cuda':
            numbers = numbers.pin_memory()
        numbers = numbers.to(x.device, x.dtype, non_blocking=True)
        other, weight = x.flip(0), numbers[:, 1].view(-1, 1, 1, 1)
        x.copy_(torch.where(_inside(numbers[:, 2:], x), other, x * weight + other * (1. - weight)))
        return numbers[:, :1]


def _inside(boxes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W), whether a place is in its image's box: top, bottom, left and right (B, 4)."""
    top, bottom, left, right = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).view(-1, 1)
    columns = torch.arange(width, device=images.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
