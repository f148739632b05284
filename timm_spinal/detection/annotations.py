"""Annotated images as every format gives them, and what is done about boxes that cannot be used.

- A box that reaches out of its image is cut at the border (``clipped``), and one that is less than a pixel wide or high
  is left out (``empty``): torchvision's `ClampBoundingBoxes` and `SanitizeBoundingBoxes`.
- Boxes in fractions of the image's sides are turned into pixels (``scaled``), where all of a split are; of objects that
  have no box but an outline, the box around it is taken (``outlined``).
- A crowd (COCO) or difficult object (VOC) is not trained on and is neither right nor wrong in evaluation (``crowd``).
- An image without a box is left out of training unless ``keep_empty`` (``without``); evaluation keeps it.
- What a file lists twice, word for word, is read once (``repeated``). An image that lies in another folder or has
  another suffix than its annotations say is taken if there is one only (``renamed``).
- Sizes that are not known are read from the images.

Unknown classes, images that are missing and numbers that are none stop with an error: what is meant cannot be known.
"""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os.path import isfile
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from timm_spinal.errors import UserError
from timm_spinal.training.image_files import shown

from .values import Corners

# So few boxes below a pixel may be among others by mistake, as in large data sets; more of them are fractions.
FEW = 1e-3


@dataclass
class Box:
    """One annotation: x1, y1, x2, y2 as its file counts them, label from 1 on; area in pixels of the object, if that is
    known; ``where`` names it in errors."""
    corners: Corners
    label: int
    where: str
    crowd: bool = False
    area: float | None = None


@dataclass
class Entry:
    """One image and its boxes as they were found; ``where`` names it in errors, ``size`` is width and height."""
    file: Path
    where: str
    size: tuple[int, int]
    boxes: Sequence[Box]


@dataclass
class Annotated:
    """One image: its file, size and boxes (N, 4) as x1, y1, x2, y2 inside it."""
    file: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


@dataclass
class Counts:
    """What a split holds and what was done about its boxes."""
    images: int = 0
    boxes: int = 0
    crowd: int = 0
    clipped: int = 0
    empty: int = 0
    without: int = 0
    scaled: int = 0
    outlined: int = 0
    repeated: int = 0
    renamed: int = 0


@dataclass
class DetectionSet:
    """One split."""
    name: str
    images: list[Annotated]
    class_names: list[str]
    counts: Counts = field(default_factory=Counts)

    def describe(self) -> str:
        """One line for people; only counts that are not 0."""
        counts = asdict(self.counts)
        texts = dict(crowd='crowd or difficult', clipped='boxes cut at the border', empty='empty boxes left out',
                     without='images without boxes', scaled='boxes given in fractions of the image',
                     outlined='boxes made of outlines', repeated='entries listed twice',
                     renamed='images in another folder or with another suffix')
        return ', '.join([f'{self.name}: {self.counts.images} images, {self.counts.boxes} boxes of '
                          f'{len(self.class_names)} classes',
                          *(f'{counts[key]} {text}' for key, text in texts.items() if counts[key])])


def gather(
        name: str,
        entries: Sequence[Entry],
        class_names: list[str],
        counts: Counts,
        first_pixel: int = 0,
) -> DetectionSet:
    """A split of what was found in its files.

    Args:
        name: Names the split in errors.
        entries: Its images.
        class_names: Of label 1, 2, ...
        counts: Counts on.
        first_pixel: Number of the first pixel. From 1 on, corners are numbers of pixels, and the last one is inside.

    Raises:
        UserError: Images that are missing or listed twice, boxes of which some are fractions and some pixels.
    """
    check_images(name, entries)
    fractions = are_fractions([box for entry in entries for box in entry.boxes])
    of_size: dict[tuple[int, int], list[int]] = {}
    for place, entry in enumerate(entries):
        of_size.setdefault(entry.size, []).append(place)
    images: dict[int, Annotated] = {}
    for places in of_size.values():
        images.update(zip(places, annotate([entries[place] for place in places], counts, fractions, first_pixel)))
    return DetectionSet(name, [images[place] for place in range(len(entries))], class_names, counts)


CUT = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(
    labels_getter=lambda sample: tuple(sample[key] for key in ('labels', 'iscrowd', 'area', 'image', 'given')))])


def annotate(
        entries: Sequence[Entry],
        counts: Counts,
        fractions: bool = False,
        first_pixel: int = 0,
) -> list[Annotated]:
    """Cut and count the boxes of images.

    Args:
        entries: The images, all of one size: torchvision then cuts their boxes together.
        counts: Counts on.
        fractions: The corners are fractions of the image's sides.
        first_pixel: See `gather`.
    """
    width, height = entries[0].size
    found = [box for entry in entries for box in entry.boxes]
    given = torch.tensor([box.corners for box in found], dtype=torch.float64).reshape(-1, 4)
    if fractions:
        given *= torch.tensor([width, height, width, height])
        counts.scaled += len(given)
    else:
        # corners at the same place are a click, no object of one pixel
        given[:, :2] -= first_pixel * (given[:, 2:] > given[:, :2])
    areas = [math.nan if fractions or box.area is None else box.area for box in found]
    kept = CUT(dict(
        boxes=BoundingBoxes(given, format=BoundingBoxFormat.XYXY, canvas_size=(height, width)),
        labels=torch.tensor([box.label for box in found], dtype=torch.int64),
        iscrowd=torch.tensor([box.crowd for box in found], dtype=torch.bool),
        area=torch.tensor(areas, dtype=torch.float64),
        image=torch.arange(len(entries)).repeat_interleave(torch.tensor([len(entry.boxes) for entry in entries])),
        given=given,
    ))
    boxes = kept['boxes'].as_subclass(torch.Tensor)
    area = torch.where(kept['area'].isnan(), (boxes[:, 2:] - boxes[:, :2]).prod(1), kept['area'])
    counts.images += len(entries)
    counts.boxes += len(boxes)
    counts.crowd += int(kept['iscrowd'].sum())
    counts.clipped += int((boxes != kept['given']).any(1).sum())
    counts.empty += len(given) - len(boxes)
    counts.without += len(entries) - len(kept['image'][~kept['iscrowd']].unique())
    columns = boxes.float(), kept['labels'], kept['iscrowd'], area.float()
    lengths = kept['image'].bincount(minlength=len(entries)).tolist()
    return [Annotated(entry.file, width, height, *(values.numpy() for values in of_image))
            for entry, *of_image in zip(entries, *(column.split(lengths) for column in columns))]


def are_fractions(boxes: Sequence[Box]) -> bool:
    """Whether boxes are given in fractions of the image's sides.

    Raises:
        UserError: Some are, and others are in pixels.
    """
    corners = np.array([box.corners for box in boxes]).reshape(-1, 4)
    some = (corners[:, 2:] > corners[:, :2]).all(1)  # an empty box says nothing
    near = ((corners >= -0.5) & (corners <= 1.5)).all(1)  # a fraction may reach over the border too
    fractions = some & near & (corners != corners.round()).any(1)
    pixels = some & ~near
    if pixels.any() and fractions.sum() > FEW * some.sum():
        one, other = (boxes[int(kind.argmax())].where for kind in (fractions, pixels))
        raise UserError(f'{one}: its box seems to be in fractions of the image, from 0 to 1 ({fractions.sum()} of '
                        f'{len(boxes)} boxes), but {other} is in pixels; write all of them in pixels')
    return bool(fractions.any() and not pixels.any())


def check_images(name: str, entries: Sequence[Entry]) -> None:
    """Refuse a split whose images are not there, or that has an image twice.

    Raises:
        UserError: Says how many, and names one.
    """
    missing = [entry.file for entry in entries if not isfile(entry.file)]
    if missing:
        raise UserError(f'{name}: {len(missing)} of {len(entries)} images are missing, for instance '
                        f'{shown(str(missing[0]))}; check --data-dir')
    if not entries:
        raise UserError(f'{name}: it has no images; check --data-dir and the annotations')
    first: dict[Path, Entry] = {}
    for entry in entries:
        if (other := first.setdefault(entry.file, entry)) is not entry:
            raise UserError(f'{entry.where}: its image {shown(str(entry.file))} is also that of {other.where}; merge '
                            'their annotations')


def label_of(name: str, class_names: list[str], where: str) -> int:
    """The label of a class, from 1 on.

    Raises:
        UserError: It is not among the classes.
    """
    if name not in class_names:
        known = ', '.join(class_names[:8]) + (', ...' if len(class_names) > 8 else '')
        raise UserError(f'{where}: unknown class {name!r}; the training split has {known or "none"}; rename it to one '
                        'of these, or add it to the training split')
    return class_names.index(name) + 1
