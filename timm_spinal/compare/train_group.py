"""The training loop of a group of heads on cached features: one head for each of some seeds."""
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from timm_spinal.errors import UserError
from timm_spinal.training.dataset import TrainSampler

from .stacked import SeparateHeads, StackedHeads

_FUSED = ('adam', 'adamw', 'sgd', 'momentum')  # torch has these in one pass over the weights
EVAL_BATCH = 4096


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
    """One head of one seed at its best epoch on the validation split.

    Attributes:
        history: A row for each epoch, with the columns of the trainer's ``summary.csv``.
        seconds: Of training and validation; the seeds that train together share them equally.
        failure: Why there is no best epoch, or ''.
    """
    seed: int
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.
    failure: str = ''


def train_group(
        group: StackedHeads | SeparateHeads,
        seeds: list[int],
        train: Features,
        validation: Features,
        recipe: Recipe,
) -> list[Trained]:
    """Train a group to the last epoch; each seed keeps its best epoch on the validation split."""
    start = time.perf_counter()
    samplers = [TrainSampler(train.x.shape[1], seed) for seed in seeds]
    steps = train.x.shape[1] // recipe.batch_size
    optimizer, scheduler = _create_optimizer(group, recipe, steps)
    results = [Trained(seed) for seed in seeds]
    for epoch in range(recipe.epochs):
        losses = _train_epoch(group, samplers, train, recipe, optimizer, scheduler, epoch, steps)
        metrics = evaluate(group, validation)
        states = group.states()
        for i, result in enumerate(results):
            row = {name: float(values[i]) for name, values in metrics.items()}
            result.history.append(dict(
                epoch=epoch, train_loss=float(losses[i]), eval_loss=row['loss'], eval_top1=row['top1'],
                lr=optimizer.param_groups[0]['lr']))
            if math.isfinite(row['loss']) and (not result.best or row['top1'] > result.best['top1']):
                result.best, result.best_epoch = row, epoch
                result.state = {  # safetensors takes no others than contiguous ones
                    name: value.clone(memory_format=torch.contiguous_format) for name, value in states[i].items()
                }
    for result in results:
        result.seconds = (time.perf_counter() - start) / len(seeds)
        last = result.history[-1]
        if not (math.isfinite(last['train_loss']) and math.isfinite(last['eval_loss'])):
            result.failure = f'the loss is {last["train_loss"]} after {recipe.epochs} epochs; use a lower learning rate'
    return results


def _train_epoch(
        group: StackedHeads | SeparateHeads,
        samplers: list[TrainSampler],
        train: Features,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        scheduler: CosineLRScheduler,
        epoch: int,
        steps: int,
) -> torch.Tensor:
    """Mean training loss of each seed, (M,)."""
    orders, passes = zip(*(_order(sampler, epoch, train.x.shape[0]) for sampler in samplers))
    order = torch.stack(orders).to(train.y.device)
    which = torch.stack(passes).to(train.y.device)
    total = torch.zeros(len(samplers), device=train.y.device)
    for step in range(steps):
        scheduler.step_update(epoch * steps + step)
        here = slice(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        index = order[:, here]
        rows = index + train.x.shape[1] * which[:, here]
        # index_select copies rows, which indexing with a tensor does a number at a time
        x = train.x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
        output = group.forward_train(x)
        loss = F.cross_entropy(
            output.flatten(0, 1), train.y[index].flatten(), reduction='none', label_smoothing=recipe.smoothing)
        loss = loss.view_as(index).mean(dim=1)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()
        total += loss.detach()
    return total / steps


def _order(sampler: TrainSampler, epoch: int, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    sampler.begin_epoch(epoch)
    order, seeds = sampler.draw()
    return order, seeds % passes


@torch.no_grad()
def evaluate(group: StackedHeads | SeparateHeads, split: Features) -> dict[str, torch.Tensor]:
    """Mean ``loss`` in nats and ``top1`` in percent of each head over features (1, N, ...)."""
    loss, hits = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for x, y in zip(split.x[0].split(EVAL_BATCH), split.y.split(EVAL_BATCH)):
        output = group.forward_eval(x)
        target = y.expand(len(output), -1)
        loss = loss + F.cross_entropy(output.transpose(1, 2), target, reduction='none').double().sum(dim=1).cpu()
        hits = hits + (output.argmax(dim=2) == target).sum(dim=1).cpu()
    return dict(loss=loss / len(split.y), top1=100. * hits / len(split.y))


def _create_optimizer(
        group: StackedHeads | SeparateHeads,
        recipe: Recipe,
        steps: int,
) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    named = group.parameters()
    groups = [
        dict(params=[p for p, decays in named if decays], weight_decay=recipe.weight_decay),
        dict(params=[p for p, decays in named if not decays], weight_decay=0.),
    ]
    kwargs: dict[str, Any] = dict(fused=True) if recipe.opt in _FUSED else {}
    groups = [g for g in groups if g['params']]
    try:
        optimizer = create_optimizer_v2(
            groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **kwargs)
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
