"""The objective of detectors as a timm `TrainingTask`."""
from typing import Any

import torch
import torch.nn as nn

from timm_spinal.training.task import Task


class DetectionTask(Task):
    """The losses of a torchvision detector and their sum, as its authors weigh them.

    Args:
        model: Made by `create_detector`, on its device.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(device=device, verbose=False)
        self.trainable_module = model

    def forward(self, images: Any, targets: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Images (3, H, W) and targets, a list each, to the sum ``loss`` and the losses by name."""
        losses = self.trainable_module(images, targets)
        return dict(loss=sum(losses.values()), **losses)
