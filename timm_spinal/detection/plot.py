"""Boxes on images: the truth and what a detector found."""
import math
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from timm_spinal.evaluation.figures import new_figure, save_figure
from timm_spinal.training.pixels import Decoder

from .annotations import Annotated
from .coco_metrics import Detections
from .data import read_image

MOST_IMAGES, MIN_SCORE = 8, 0.5


def draw_boxes(
        path: Path,
        images: Sequence[Annotated],
        detections: dict[int, Detections],
        class_names: list[str],
        decode: Decoder,
) -> None:
    """Draw the first images that have boxes: the true ones dashed and white, those found with a score in colour.

    Args:
        path: PNG file.
        images: The images of a split.
        detections: What was found on them, by place; boxes with a score below `MIN_SCORE` are left out.
        class_names: Of label 1, 2, ...
        decode: As the detector gets its images.
    """
    chosen = [i for i, image in enumerate(images) if len(image.boxes)][:MOST_IMAGES]
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(4 * columns, 4 * rows)
    for axes in (all_axes := figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis('off')
    for axes, i in zip(all_axes.base.flat, chosen):
        image = read_image(images[i], decode)
        # a pixel reaches from its number to the next, as boxes count
        axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0))
        for box in images[i].boxes:
            _rectangle(axes, box, 'white', '--')
        for box, label, score in zip(*detections[i]):
            if score >= MIN_SCORE:
                colour = f'C{(label - 1) % 10}'
                _rectangle(axes, box, colour, '-')
                axes.text(box[0], box[1], f'{class_names[label - 1]} {score:.2f}', fontsize=7, color='white',
                          verticalalignment='bottom', bbox=dict(facecolor=colour, pad=1, linewidth=0))
    save_figure(figure, path)


def _rectangle(axes: Any, box: np.ndarray, colour: str, style: str) -> None:
    from matplotlib.patches import Rectangle
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linestyle=style, linewidth=1.5))
