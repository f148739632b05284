"""Annotated images as every format gives them, and what is done about boxes that cannot be used.

- A box that reaches out of its image is cut at the border (``clipped``).
- A box of which less than `MIN_SIDE` pixels are left inside the image is left out (``empty``).
- A crowd (COCO) or difficult object (VOC) is not trained on and is neither right nor wrong in evaluation (``crowd``).
- An image without a box is left out of training unless ``keep_empty`` (``without``); evaluation keeps it.

Unknown classes, images that are missing and numbers that are none stop with an error: what is meant cannot be known.
"""
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from timm_spinal.errors import UserError

MIN_SIDE = 0.01  # of a box in pixels; less may vanish in float32


@dataclass
class Box:
    """One annotation: x1, y1, x2, y2 in pixels, label from 1 on, area in pixels (of the object, if that is known)."""
    corners: tuple[float, float, float, float]
    label: int
    crowd: bool = False
    area: float | None = None


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
                     without='images without boxes')
        return ', '.join([f'{self.name}: {self.counts.images} images, {self.counts.boxes} boxes of '
                          f'{len(self.class_names)} classes',
                          *(f'{counts[key]} {text}' for key, text in texts.items() if counts[key])])


def annotate(file: Path, size: tuple[int, int], boxes: Sequence[Box], counts: Counts) -> Annotated:
    """Cut and count the boxes of one image.

    Args:
        file: The image.
        size: Width and height in pixels.
        boxes: As they were found.
        counts: Counts on.
    """
    width, height = size
    kept, areas = [], []
    for box in boxes:
        x1, y1, x2, y2 = box.corners
        inside = max(x1, 0.), max(y1, 0.), min(x2, float(width)), min(y2, float(height))
        if inside[2] - inside[0] < MIN_SIDE or inside[3] - inside[1] < MIN_SIDE:
            counts.empty += 1
            continue
        counts.clipped += inside != tuple(box.corners)
        counts.crowd += box.crowd
        kept.append((inside, box))
        areas.append((inside[2] - inside[0]) * (inside[3] - inside[1]) if box.area is None else box.area)
    counts.images += 1
    counts.boxes += len(kept)
    counts.without += not any(not box.crowd for _, box in kept)
    return Annotated(
        file, width, height,
        boxes=np.array([inside for inside, _ in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([box.label for _, box in kept], dtype=np.int64),
        crowd=np.array([box.crowd for _, box in kept], dtype=bool),
        area=np.array(areas, dtype=np.float32),
    )


def four_numbers(values: Any, where: str) -> tuple[float, float, float, float]:
    """Four finite numbers.

    Raises:
        UserError: They are not; ``where`` names the annotation.
    """
    try:
        a, b, c, d = (float(value) for value in values)
    except (TypeError, ValueError) as e:
        raise UserError(f'{where}: its box is {values!r}, not four numbers; mend it') from e
    if not np.isfinite([a, b, c, d]).all():
        raise UserError(f'{where}: its box {values!r} is not finite; mend it')
    return a, b, c, d


def check_images(name: str, images: Sequence[Annotated]) -> None:
    """Refuse a split whose images are not there.

    Raises:
        UserError: Says how many, and names one.
    """
    missing = [image.file for image in images if not image.file.is_file()]
    if missing:
        raise UserError(f'{name}: {len(missing)} of {len(images)} images are missing, for instance {missing[0]}; check '
                        '--data-dir')
    if not images:
        raise UserError(f'{name}: it has no images')


def label_of(name: str, class_names: list[str], where: str) -> int:
    """The label of a class, from 1 on.

    Raises:
        UserError: It is not among the classes.
    """
    if name not in class_names:
        known = ', '.join(class_names[:8]) + (', ...' if len(class_names) > 8 else '')
        raise UserError(f'{where}: unknown class {name!r}; the training split has {known}')
    return class_names.index(name) + 1
