"""COCO's average precision by pycocotools, for the boxes of any data set."""
import contextlib
import io
from typing import Any, NamedTuple, Sequence

import numpy as np

from timm_spinal.errors import UserError

from .annotations import Annotated
from .options import METRICS


class Detections(NamedTuple):
    """What a detector found on one image: boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N,), scores (N,)."""
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def check_installed() -> None:
    """Raises a UserError where pycocotools is not installed."""
    try:
        import pycocotools  # noqa: F401
    except ImportError as e:
        raise UserError("detection: pycocotools, which measures AP, is not installed; pip install "
                        "'timm-spinal[detection]'") from e


def average_precision(
        images: Sequence[Annotated],
        detections: dict[int, Detections],
        num_classes: int,
) -> dict[str, float | None]:
    """AP over IoU 0.5 to 0.95, at 0.5 and 0.75, and of small, medium and large objects, each in percent.

    At most 100 boxes of an image count, crowds are neither right nor wrong, and the sizes are COCO's: up to 32 x 32
    pixels and 96 x 96.

    Args:
        images: The images of the split with their true boxes.
        detections: What was found, by the place of the image in ``images``.
        num_classes: Classes without background; labels are 1 to this.

    Returns:
        By the names `METRICS`; None where there is no such object.
    """
    check_installed()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        both = []
        for annotations in (_truth(images), _coco_detections(detections)):
            coco = COCO()
            coco.dataset = dict(
                images=[dict(id=i, width=image.width, height=image.height) for i, image in enumerate(images)],
                categories=[dict(id=label, name=str(label)) for label in range(1, num_classes + 1)],
                annotations=annotations)
            coco.createIndex()
            both.append(coco)
        measured = COCOeval(*both, iouType='bbox')
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    # -1 is pycocotools' word for none
    return {name: 100. * float(value) if value >= 0 else None for name, value in zip(METRICS, measured.stats)}


def _truth(images: Sequence[Annotated]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, image in enumerate(images):
        for box, label, crowd, area in zip(image.boxes, image.labels, image.crowd, image.area):
            rows.append(dict(_row(i, box, label, len(rows)), iscrowd=int(crowd), area=float(area)))
    return rows


def _coco_detections(detections: dict[int, Detections]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, of_image in sorted(detections.items()):
        for box, label, score in zip(*of_image):
            row = _row(i, box, label, len(rows))
            rows.append(dict(row, iscrowd=0, area=row['bbox'][2] * row['bbox'][3], score=float(score)))
    return rows


def _row(image: int, box: np.ndarray, label: int, number: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box.tolist()
    # pycocotools takes the id 0 for no match
    return dict(id=number + 1, image_id=image, category_id=int(label), bbox=[x1, y1, x2 - x1, y2 - y1])
