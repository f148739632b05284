"""Train one head on cached features, with one seed."""
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from timm_spinal.errors import UserError
from timm_spinal.training.dataset import TrainSampler

_FUSED = ('adam', 'adamw', 'sgd', 'momentum')  # optimizers that torch has as one kernel
EVAL_BATCH = 4096
_EVAL_NUMBERS = 2 ** 24  # of the features of a batch, since heads of tokens compute larger ones


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: AdamW-like optimizer, linear warm-up and cosine decay to zero, cross entropy in nats."""
    epochs: int = 30
    batch_size: int = 512
    opt: str = 'adamw'
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup_epochs: float = 1.
    smoothing: float = 0.


@dataclass(frozen=True)
class Features:
    """Features of one split.

    Attributes:
        x: (P, N, ...), one row of images for each pass; pass 0 is without augmentation.
        y: Classes, (N,).
    """
    x: torch.Tensor
    y: torch.Tensor

    def to(self, device: torch.device) -> 'Features':
        return Features(self.x.to(device), self.y.to(device))


@dataclass
class Trained:
    """A head at its best epoch on the validation split.

    Attributes:
        history: A row for each epoch, with the columns of the trainer's ``summary.csv``.
        seconds: Wall time of training and validation.
        failure: Why training failed, or ''.
    """
    seed: int
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.
    failure: str = ''


class SeededDropout(nn.Module):
    """`nn.Dropout` that draws its masks from a generator of its own, so that heads can train in threads.

    NumPy draws them: `torch.nn.functional.dropout` takes longer on a CPU than the matrix product behind it.
    """

    def __init__(self, p: float, generator: np.random.Generator):
        super().__init__()
        self.p = p
        self.generator = generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.:
            return x
        words = self.generator.integers(2 ** 64, size=-(-x.numel() // 4), dtype=np.uint64)
        values = words.view(np.uint16)[:x.numel()]  # of 16 bits each, as is the rate
        keep = values >= min(round(self.p * 2 ** 16), 2 ** 16 - 1)
        mask = np.multiply(keep, np.float32(1. / (1. - self.p)))  # several times as fast as by torch
        return x * torch.from_numpy(mask).view(x.shape).to(x)


def seed_dropout(head: nn.Module, seed: int) -> None:
    """Replace every `nn.Dropout` of a head, in place, by one that draws from a generator with this seed."""
    generator = np.random.Generator(np.random.SFC64(seed))
    for module in list(head.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, SeededDropout(child.p, generator))


def train_head(head: nn.Module, seed: int, train: Features, validation: Features, recipe: Recipe) -> Trained:
    """Train a head to the last epoch and keep its best epoch on the validation split.

    Args:
        head: New head on the device of the features; it is trained in place.
        seed: Decides on the order of the images, the pass of each image, and dropout.
        train: Features to train on.
        validation: Features (1, N, ...) to choose the epoch by.
        recipe: How to train.

    Raises:
        UserError: An unknown optimizer.
    """
    start = time.perf_counter()
    seed_dropout(head, seed)
    sampler, result = TrainSampler(train.x.shape[1], seed), Trained(seed)
    optimizer, scheduler = _create_optimizer(head, recipe, train.x.shape[1] // recipe.batch_size)
    for epoch in range(recipe.epochs):
        train_loss = _train_epoch(head, sampler, train, recipe, optimizer, scheduler, epoch)
        metrics = evaluate(head, validation)
        result.history.append(dict(
            epoch=epoch, train_loss=train_loss, eval_loss=metrics['loss'], eval_top1=metrics['top1'],
            lr=optimizer.param_groups[0]['lr']))
        if math.isfinite(metrics['loss']) and (not result.best or metrics['top1'] > result.best['top1']):
            result.best, result.best_epoch = metrics, epoch
            result.state = {name: value.clone() for name, value in head.state_dict().items()}
    result.seconds = time.perf_counter() - start
    last = result.history[-1]
    if not (math.isfinite(last['train_loss']) and math.isfinite(last['eval_loss'])):
        result.failure = f'the loss is {last["train_loss"]} after {recipe.epochs} epochs; use a lower learning rate'
    return result


def _train_epoch(
        head: nn.Module,
        sampler: TrainSampler,
        train: Features,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        scheduler: CosineLRScheduler,
        epoch: int,
) -> float:
    """Mean training loss of an epoch; images that fill no batch are left out."""
    head.train()
    sampler.begin_epoch(epoch)
    order, seeds = (values.to(train.y.device) for values in sampler.draw())
    passes, images = train.x.shape[:2]
    rows, x = order + images * (seeds % passes), train.x.flatten(0, 1)
    steps = images // recipe.batch_size
    total = torch.zeros((), device=train.y.device)
    for step in range(steps):
        scheduler.step_update(epoch * steps + step)
        batch = slice(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        # index_select copies whole rows, and is faster than indexing with a tensor
        output = head(x.index_select(0, rows[batch]))
        loss = F.cross_entropy(output, train.y[order[batch]], label_smoothing=recipe.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total / steps)


@torch.no_grad()
def evaluate(head: nn.Module, split: Features) -> dict[str, float]:
    """Mean ``loss`` in nats and ``top1`` in percent over features (1, N, ...)."""
    head.eval()
    loss, hits = 0., 0
    batch = eval_batch(split.x)
    for x, y in zip(split.x[0].split(batch), split.y.split(batch)):
        output = head(x)
        loss += float(F.cross_entropy(output, y, reduction='none').double().sum())
        hits += int((output.argmax(dim=1) == y).sum())
    return dict(loss=loss / len(split.y), top1=100. * hits / len(split.y))


def eval_batch(x: torch.Tensor) -> int:
    """How many images of features (1, N, ...) are evaluated at a time."""
    return max(1, min(EVAL_BATCH, _EVAL_NUMBERS // x[0, 0].numel()))


def _create_optimizer(
        head: nn.Module,
        recipe: Recipe,
        steps: int,
) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """timm's optimizer, without weight decay for vectors, and the schedule for so many steps an epoch."""
    kwargs: dict[str, Any] = dict(fused=True) if recipe.opt in _FUSED else {}
    try:
        optimizer = create_optimizer_v2(
            head, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **kwargs)
    except (ValueError, AssertionError, ImportError) as e:
        raise UserError(f'--opt {recipe.opt}: {" ".join(str(e).split())}; use for instance adamw or sgd') from e
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps,
        warmup_t=round(recipe.warmup_epochs * steps),
        warmup_lr_init=recipe.lr / 100,
        t_in_epochs=False,
    )
    return optimizer, scheduler
