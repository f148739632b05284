"""Exact evaluation: every image counts once, whatever the number of processes."""
import math
import time
from typing import Any, Callable

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.errors import UserError

from .metrics import SameAnswer, evaluator_for


@torch.no_grad()
def evaluate(
        accelerator: Accelerator,
        model: nn.Module,
        loader: DataLoader,
        channels_last: bool = False,
        description: str = 'evaluate',
        multi_label: bool = False,
        keep: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
        flip: bool = False,
) -> dict[str, Any]:
    """Loss and accuracy of a model over a loader.

    The last batches that Accelerate fills up so that all processes have the same number are cut again, and rows
    with target -1 (images that could not be read) are left out. Where there are several crops of an image, the mean of
    their probabilities counts (Krizhevsky et al. 2012, whose ten-crop testing ResNet's tables have).

    Args:
        accelerator: The loader must have been prepared by it.
        model: Left in eval mode. The first output counts when it returns several.
        loader: Yields images (B, C, H, W), or crops of them (B, N, C, H, W), and class indices (B,), or memberships
            (B, classes).
        channels_last: Give the images in that memory format.
        description: Title of the progress bar.
        multi_label: Images have two classes, and targets are memberships.
        keep: Is given the logits and targets that count, and their places in the loader's order, batch by batch, in
            every process.
        flip: The mean of the probabilities of an image and its mirror image counts.

    Returns:
        ``loss`` in nats, ``top1`` and ``top5`` in percent (or what `PairEvaluator` measures), ``images`` counted,
        ``nonfinite`` (images among them with a NaN or infinite logit), ``same_answer`` (`SameAnswer`) and
        ``seconds``. The same on every process.

    Raises:
        UserError: No readable image.
    """
    start = time.perf_counter()
    model.eval()
    evaluator = evaluator_for(multi_label)(device=accelerator.device)
    same_answer = SameAnswer(2 if multi_label else 1)
    nonfinite = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    seen = 0
    bar = tqdm(loader, desc=description, leave=False, disable=None if accelerator.is_main_process else True)
    for images, target in bar:
        if flip:
            images = torch.stack([images, images.flip(-1)], dim=-4)
        crops = images.shape[1:-3]
        images = images.flatten(0, -4)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(images)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if crops:
            output = _mean_over_crops(output.view(-1, math.prod(crops), output.shape[-1]))
        output, target = accelerator.gather_for_metrics((output.contiguous(), target))
        readable = target >= 0 if target.ndim == 1 else (target >= 0).all(-1)
        places = torch.arange(seen, seen + len(target), device=target.device)[readable]
        seen += len(target)
        output, target = output[readable], target[readable]
        evaluator.update(output, target)
        same_answer.update(output, target)
        if keep is not None:
            keep(output, target, places)
        nonfinite += (~output.isfinite().all(dim=-1)).sum()
    if evaluator.num_samples == 0:
        raise UserError('evaluation: no readable image in the evaluation split; check --data-dir and --val-split')
    return dict(
        evaluator.compute(),
        images=evaluator.num_samples,
        nonfinite=int(nonfinite),
        same_answer=same_answer.compute(),
        seconds=time.perf_counter() - start,
    )


def _mean_over_crops(output: torch.Tensor) -> torch.Tensor:
    """Logits (B, N, K) of crops as logarithms (B, K) of their mean probabilities."""
    return output.float().log_softmax(dim=-1).logsumexp(dim=1) - math.log(output.shape[1])
