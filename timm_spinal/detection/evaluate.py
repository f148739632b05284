"""Exact evaluation of a detector: every image counts once, whatever the number of processes."""
import time
from typing import Any, Sequence

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.training.agree import agree

from .annotations import Annotated
from .coco_metrics import Found, average_precision


@torch.no_grad()
def detect(accelerator: Accelerator, model: nn.Module, loader: DataLoader, description: str) -> dict[int, Found]:
    """What a detector finds on the images of a loader, by their place; the same on every process.

    Args:
        accelerator: The loader must have been prepared by it.
        model: Left in eval mode.
        loader: Of `data.DetectionData`.
        description: Title of the progress bar.
    """
    model.eval()
    found = []
    bar = tqdm(loader, desc=description, leave=False, disable=None if accelerator.is_main_process else True)
    for images, targets in bar:
        with accelerator.autocast():
            answers = model(images)
        for target, answer in zip(targets, answers):
            values = (answer[name].float() if name != 'labels' else answer[name] for name in Found._fields)
            found.append((int(target['image_id']), Found(*(value.cpu().numpy() for value in values))))
    # images that Accelerate adds so that all processes have the same number come twice
    return dict(gather_object(found))


class Measure:
    """AP of a model over a loader, as the loop wants it.

    Args:
        accelerator: Of the run.
        images: The images of each loader's split, by the titles ``eval``, ``ema`` and ``test``.
        num_classes: Classes without background.

    Attributes:
        found: What was found last, by title.
    """

    def __init__(self, accelerator: Accelerator, images: dict[str, Sequence[Annotated]], num_classes: int):
        self.accelerator = accelerator
        self.images = images
        self.num_classes = num_classes
        self.found: dict[str, dict[int, Found]] = {}

    def __call__(self, model: nn.Module, loader: DataLoader, name: str) -> dict[str, Any]:
        """``ap`` ... ``ap_large`` in percent, ``images`` and ``seconds``; the same on every process."""
        start = time.perf_counter()
        found = self.found[name] = detect(self.accelerator, model, loader, name)
        images = self.images[name]
        metrics = agree(self.accelerator, lambda: average_precision(images, found, self.num_classes))
        return dict(metrics, images=len(images), seconds=time.perf_counter() - start)
