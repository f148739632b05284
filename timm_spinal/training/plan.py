"""What a run is going to do, said before its first update, and what follows from its number of updates."""
import math
from typing import Any, Mapping, Sequence

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from .loop import Run

FEW_UPDATES = 100
FAST_MOMENTUM = 0.1  # PyTorch's default
WINDOWS = 20  # times that the running statistics of BatchNorm are renewed in a run, at least


def updates_per_epoch(run: Run) -> int:
    """Optimizer updates of an epoch; the last may have fewer batches than the others."""
    return math.ceil(len(run.train_loader) / run.accelerator.gradient_accumulation_steps)


def plan_lines(run: Run) -> list[str]:
    """The plan of a run in one line, and a warning for each part of it with which a model hardly learns."""
    config, updates, epochs = run.config, updates_per_epoch(run), run.last_epoch
    processes, accum = run.accelerator.num_processes, run.accelerator.gradient_accumulation_steps
    batch = f'batch {config.batch_size}'
    batch += f' x {processes} processes' if processes > 1 else ''
    batch += f' x {accum} steps' if accum > 1 else ''
    warmup = 0 if run.scheduler is None else config.warmup_epochs
    parts = [
        f'{run.data.train_size} images', batch, f'{updates} updates an epoch', f'{epochs} epochs',
        f'{updates * epochs} updates in all', f'warm-up {round(warmup * updates)} updates',
        f'{_left_out(run)} images left out of each epoch',
    ]
    if run.head_first.epochs:
        parts.append(f'{min(run.head_first.epochs, epochs)} epochs of the head alone')
    lines = ['plan: ' + ', '.join(parts)]
    if 2 * warmup > epochs:
        lines.append(f'warning: {min(warmup, epochs):g} of {epochs} epochs are warm-up, in which the learning rate is '
                     f'still low; lower --warmup-epochs or raise --epochs')
    if updates * epochs < FEW_UPDATES:
        lines.append(f'warning: {updates * epochs} updates are few for a model to learn from; raise --epochs, lower '
                     f'--batch-size, or give --min-updates 300')
    return lines


def _left_out(run: Run) -> int:
    """Images that an epoch does not see: of a last batch that is not full, or by --epoch-repeats and --aug-repeats."""
    drawn = len(run.train_loader) * run.config.batch_size * run.accelerator.num_processes
    different = math.ceil(drawn / max(1., getattr(run.config, 'aug_repeats', 0.)))
    return max(0, run.data.train_size - different)


def fit_momentum(
        model: nn.Module,
        updates: int,
        options: Mapping[str, Any],
        kept_in_eval: Sequence[nn.Module] = (),
) -> list[str]:
    """Raise the momentum of slow BatchNorm layers in a short run, so that their running statistics keep up.

    The statistics remember about 1 / momentum updates; a run is to have 20 times as many. So the 0.01 of the capsule
    heads, which is their authors', holds from 2,000 updates on, and shorter runs have up to 0.1, PyTorch's default.

    Args:
        model: Changed in place; layers with a momentum that is high enough stay as they are.
        updates: Updates of the whole run.
        options: Model arguments that were given; with a momentum among them, nothing changes.
        kept_in_eval: BatchNorm layers that do not train.

    Returns:
        A line that says what changed, if anything did.
    """
    momentum = min(FAST_MOMENTUM, WINDOWS / updates)
    still = {id(module) for module in kept_in_eval}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in still]
    slow = [norm for norm in norms if norm.momentum is not None and norm.momentum < momentum]
    if not slow or any('momentum' in name for name in options):
        return []
    lowest = min(norm.momentum or 0. for norm in slow)
    for norm in slow:
        norm.momentum = momentum
    return [f'BatchNorm momentum of {len(slow)} layers: {momentum:.2g} in place of {lowest:g}, for a run of {updates} '
            f'updates']
