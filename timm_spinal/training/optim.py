"""timm's optimizers and schedules from a config, and gradient clipping under Accelerate."""
import difflib
import math
from dataclasses import replace

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from timm_spinal.errors import UserError

from .config import LoopConfig


def resolve_lr(config: LoopConfig, global_batch_size: int) -> float:
    """``lr`` when given, else ``lr_base`` scaled from ``lr_base_size`` to the images of one update.

    The scaling is linear, or by the square root for adaptive optimizers, as in timm.

    Args:
        config: The run's config.
        global_batch_size: Images per update: batch size x processes x accumulation steps.
    """
    if config.lr:
        return config.lr
    adaptive = any(part in config.opt.lower() for part in ('ada', 'lamb'))
    scale = config.lr_base_scale or ('sqrt' if adaptive else 'linear')
    ratio = global_batch_size / config.lr_base_size
    return config.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def create_optimizer(config: LoopConfig, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable parameters of a module, grouped by weight decay or layer decay.

    Raises:
        UserError: Unknown optimizer or optimizer argument.
    """
    kwargs = {**optimizer_kwargs(replace(config, lr=lr)), **config.opt_kwargs}
    try:
        return create_optimizer_v2(module, **kwargs)
    except (TypeError, ValueError, AssertionError, ImportError) as e:
        known = [str(name) for name in list_optimizers()]
        if config.opt.lower().removeprefix('lookahead_') not in known:
            near = difflib.get_close_matches(config.opt.lower(), known, n=3)
            raise UserError(f'unknown optimizer {config.opt!r}; the nearest are {", ".join(near or ["sgd", "adamw"])}'
                            ) from e
        raise UserError(f'optimizer {config.opt}: {" ".join(str(e).split())}; see --opt-kwargs') from e


def create_scheduler(
        config: LoopConfig,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> tuple[Scheduler | None, int]:
    """timm's learning rate schedule, and the epochs that it lasts (with cycles, warm-up prefix and cool-down).

    Raises:
        UserError: Settings that do not make a schedule.
    """
    try:
        return create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=updates_per_epoch)
    except (AssertionError, ValueError) as e:
        raise UserError(f'schedule {config.sched}: {" ".join(str(e).split())}; change its options') from e


def scheduler_state(scheduler: Scheduler | None) -> dict:
    """What a schedule cannot work out again from the epoch: only ``plateau`` has such a state."""
    if not isinstance(scheduler, PlateauLRScheduler):
        return {}
    return dict(plateau=scheduler.lr_scheduler.state_dict(), restore_lr=scheduler.restore_lr)


def load_scheduler_state(scheduler: Scheduler | None, state: dict) -> None:
    """Put back what `scheduler_state` returned."""
    if isinstance(scheduler, PlateauLRScheduler) and state:
        scheduler.lr_scheduler.load_state_dict(state['plateau'])
        scheduler.restore_lr = state['restore_lr']


def apply_settings(
        optimizer: torch.optim.Optimizer,
        settings: list[dict],
        scheduler: Scheduler | None,
        epoch: int,
        updates: int,
) -> None:
    """Give an optimizer whose state was loaded the settings of this run again, and the learning rate of now.

    Args:
        optimizer: Its groups hold the settings of the run before.
        settings: Copies of its groups as they were made from the config.
        scheduler: The schedule of this run.
        epoch: Epochs done.
        updates: Updates done.
    """
    names = ('lr', 'initial_lr', 'weight_decay', 'momentum', 'betas', 'eps')
    for group, wanted in zip(optimizer.param_groups, settings):
        group.update({name: wanted[name] for name in names if name in wanted})
    if scheduler is not None:
        scheduler.step(epoch)
        scheduler.step_update(updates)


def clip_gradients(accelerator: Accelerator, task: TrainingTask, value: float, mode: str) -> None:
    """Clip the gradients of one update by norm, by value or adaptively (``agc``, which leaves out the classifier)."""
    parameters = task.get_clip_parameters(exclude_head=mode == 'agc')
    if mode == 'norm':
        accelerator.clip_grad_norm_(parameters, value)
        return
    accelerator.unscale_gradients()
    dispatch_clip_grad(parameters, value=value, mode=mode)
