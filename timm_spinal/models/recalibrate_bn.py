"""New BatchNorm statistics for a model whose weights or layers were changed after training."""

from itertools import islice
from typing import Any, Iterable, Iterator, List, Optional

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Batches = Any  # a batch of images, or something that gives batches: images, or tuples that begin with images


def images_of(batches: Batches, count: Optional[int], device: torch.device) -> Iterator[torch.Tensor]:
    """Images (B, C, H, W) on a device, of at most so many batches.

    Raises:
        ValueError: If there is no batch.
    """
    given: Iterable[Any] = [batches] if isinstance(batches, torch.Tensor) else batches
    seen = False
    for batch in islice(given, count):
        seen = True
        yield (batch if isinstance(batch, torch.Tensor) else batch[0]).to(device)
    if not seen:
        raise ValueError('The loader gives no batch; pass one with images, which can be iterated more than once.')


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Batches, count: Optional[int] = 200) -> nn.Module:
    """Re-estimate the running statistics of all BatchNorm layers, as the mean over batches, in place.

    Weights stay, and all other layers are in eval mode meanwhile. Every batch has the same weight, so use batches of
    one size.

    Args:
        model: Any model; its mode and the layers' momentum are restored afterwards. A model without running statistics
            is not changed.
        batches: A loader, or a batch of images, on any device.
        count: Largest number of batches; all if None.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no batch; the statistics stay as they were.
    """
    norms: List[Any] = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for i, images in enumerate(images_of(batches, count, device_of(model))):
            for norm in norms if i == 0 else ():
                norm.reset_running_stats()
                norm.momentum = None  # with None PyTorch keeps the mean of all batches
                norm.train()
            model(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    return model
