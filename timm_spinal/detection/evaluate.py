"""Exact evaluation of a detector: every image counts once, whatever the number of processes."""
import time
from typing import Any, Sequence

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.training.distributed import on_main_process

from .annotations import Annotated
from .coco_metrics import Detections, average_precision


@torch.no_grad()
def detect(accelerator: Accelerator, model: nn.Module, loader: DataLoader, description: str) -> dict[int, Detections]:
    """What a detector finds on the images of a loader, by their place; the same on every process.

    Args:
        accelerator: The loader must have been prepared by it.
        model: Left in eval mode.
        loader: Of `data.DetectionData`.
        description: Title of the progress bar.
    """
    model.eval()
    detections = []
    bar = tqdm(loader, desc=description, leave=False, disable=None if accelerator.is_main_process else True)
    for images, targets in bar:
        with accelerator.autocast():
            answers = model(images)
        for target, answer in zip(targets, answers):
            values = (answer[name].float() if name != 'labels' else answer[name] for name in Detections._fields)
            detections.append((int(target['image_id']), Detections(*(value.cpu().numpy() for value in values))))
    # images that Accelerate adds so that all processes have the same number come twice
    return dict(gather_object(detections))


def evaluate(
        accelerator: Accelerator,
        model: nn.Module,
        loader: DataLoader,
        images: Sequence[Annotated],
        num_classes: int,
        description: str,
) -> dict[str, Any]:
    """AP of a detector over a loader; the same on every process.

    Args:
        accelerator: The loader must have been prepared by it.
        model: Left in eval mode.
        loader: Of `data.DetectionData`.
        images: Its images.
        num_classes: Classes without background.
        description: Title of the progress bar.

    Returns:
        ``ap`` ... ``ap_large`` in percent, ``detections`` (see `detect`), ``images`` and ``seconds``.
    """
    start = time.perf_counter()
    detections = detect(accelerator, model, loader, description)
    metrics = on_main_process(accelerator, lambda: average_precision(images, detections, num_classes))
    return dict(metrics, detections=detections, images=len(images), seconds=time.perf_counter() - start)
