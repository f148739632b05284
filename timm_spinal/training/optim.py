"""Which weights are trained, and how: frozen parts, timm's optimizers and schedules from a config, clipping.

The head of a model is the submodule `attached_head` of models made by `timm_spinal.attach_head`, or `head` where it has
hidden layers as the small nets' have, else what timm's `get_classifier()` returns. Everything else is the backbone.
"""
import difflib
import inspect
import math
from dataclasses import dataclass, field, replace
from typing import Any, Iterable, Sequence

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch.nn.modules.batchnorm import _BatchNorm

from timm_spinal.errors import UserError

from .config import LoopConfig

# ---- frozen parts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Freeze:
    """What of the backbone stays as it is: its weights, its BatchNorm (scale, shift and running statistics)."""
    weights: bool
    batch_norm: bool


FREEZES = {
    'none': Freeze(weights=False, batch_norm=False),
    'bn': Freeze(weights=False, batch_norm=True),
    'backbone': Freeze(weights=True, batch_norm=True),
    'backbone-except-bn': Freeze(weights=True, batch_norm=False),
}


def apply_freeze(model: nn.Module, name: str, modules: Sequence[str] = ()) -> list[nn.Module]:
    """Freeze parts of a model in place.

    Args:
        model: A timm model.
        name: One of `FREEZES`.
        modules: Names of further modules to freeze with all that is in them, BatchNorm too.

    Returns:
        The BatchNorm layers that must be put back into eval mode after every ``model.train()``.

    Raises:
        UserError: A module that does not exist, or nothing would be left to train.
    """
    freeze = FREEZES[name]
    in_head = {id(m) for head in _heads(model) for m in head.modules()}
    frozen_norms = []
    for module in model.modules():
        if id(module) in in_head:
            continue
        is_norm = isinstance(module, _BatchNorm)
        if freeze.batch_norm if is_norm else freeze.weights:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if is_norm:
                frozen_norms.append(module)
    for part in _named_parts(model, modules):
        part.requires_grad_(False)
        frozen_norms += [m for m in part.modules() if isinstance(m, _BatchNorm) and m not in frozen_norms]
    if not any(p.requires_grad for p in model.parameters()):
        if modules:
            raise UserError(f'freeze-modules {" ".join(modules)}: nothing is left to train; name fewer')
        raise UserError(f'freeze {name}: the model has no classifier, so nothing is left to train; use --freeze none')
    return frozen_norms


@dataclass
class Frozen:
    """What the loop keeps still: BatchNorm layers for the whole run, a backbone while its head trains alone.

    Attributes:
        kept_in_eval: BatchNorm layers that do not train.
        epochs: Epochs in which the head trains alone: weights of the backbone, and its BatchNorm with the statistics,
            wait.
        weights: Weights of the backbone that train afterwards.
        norms: Its BatchNorm layers.
    """
    kept_in_eval: list[nn.Module] = field(default_factory=list)
    epochs: int = 0
    weights: list[nn.Parameter] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    held: bool = False

    def begin_epoch(self, epoch: int, backward: bool) -> None:
        """Put BatchNorm layers back into eval mode, and hold the backbone or let it go; call it after ``train()``.

        Args:
            epoch: The epoch that begins.
            backward: Gradients of the weights that are held are computed all the same, for DistributedDataParallel,
                which waits for them; `drop_gradients` keeps them from the optimizer.
        """
        for norm in self.kept_in_eval:
            norm.eval()
        self.held = epoch < self.epochs
        for weight in self.weights:
            weight.requires_grad_(backward or not self.held)
        for norm in self.norms if self.held else ():
            norm.eval()

    def drop_gradients(self) -> None:
        """Leave the optimizer no gradients of weights that are held: it then passes over them."""
        if self.held:
            for weight in self.weights:
                weight.grad = None


def head_first(model: nn.Module, epochs: int, kept_in_eval: Sequence[nn.Module] = ()) -> Frozen:
    """What waits while the head of a model trains alone for some epochs.

    Args:
        model: A timm model; weights that do not train at all need no gradients already.
        epochs: Epochs in which the head trains alone, 0 for none.
        kept_in_eval: BatchNorm layers that do not train.

    Raises:
        UserError: The model has no head that trains.
    """
    if not epochs:
        return Frozen(list(kept_in_eval))
    in_head = {id(part) for head in _heads(model) for part in (*head.modules(), *head.parameters())}
    if not any(p.requires_grad for p in model.parameters() if id(p) in in_head):
        raise UserError('--freeze-epochs: the model has no classifier that trains; leave it out')
    return Frozen(
        list(kept_in_eval),
        epochs,
        [p for p in model.parameters() if p.requires_grad and id(p) not in in_head],
        [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in in_head],
    )


def _named_parts(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean {near[0]}?' if near else 'give a name of named_modules()'
            raise UserError(f'freeze-modules: the model has no module {name!r}; {hint}')
    return [known[name] for name in names]


def _heads(model: Any) -> Iterable[nn.Module]:
    if hasattr(model, 'attached_head'):
        return [model.attached_head]
    if hasattr(getattr(model, 'head', None), 'hidden'):
        return [model.head]
    classifier = model.get_classifier()
    return classifier if isinstance(classifier, (tuple, list)) else [classifier]


# ---- optimizer and schedule -------------------------------------------------------------------------------------


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

    On a CUDA device PyTorch's optimizers that can run as one kernel do so, unless ``opt_kwargs`` say otherwise.

    Raises:
        UserError: Unknown optimizer or optimizer argument.
    """
    kwargs = {**optimizer_kwargs(replace(config, lr=lr)), **config.opt_kwargs}
    try:
        if can_fuse(config, next(module.parameters()).device):
            kwargs['fused'] = True
        return create_optimizer_v2(module, **kwargs)
    except (TypeError, ValueError, AssertionError, ImportError) as e:
        known = [str(name) for name in list_optimizers()]
        if config.opt.lower().removeprefix('lookahead_') not in known:
            near = difflib.get_close_matches(config.opt.lower(), known, n=3)
            raise UserError(f'unknown optimizer {config.opt!r}; the nearest are {", ".join(near or ["sgd", "adamw"])}'
                            ) from e
        raise UserError(f'optimizer {config.opt}: {" ".join(str(e).split())}; see --opt-kwargs') from e


def can_fuse(config: LoopConfig, device: torch.device) -> bool:
    """Whether the optimizer of a config has a fused form on a device, and ``opt_kwargs`` leave the form open."""
    if device.type != 'cuda' or config.opt_kwargs.keys() & {'fused', 'foreach', 'capturable', 'differentiable'}:
        return False
    optimizer = get_optimizer_class(config.opt.lower().removeprefix('lookahead_'), bind_defaults=False)
    return 'fused' in inspect.signature(optimizer).parameters


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


def mean_lr(optimizer: Any) -> float:
    """Mean learning rate of an optimizer's groups."""
    groups = optimizer.param_groups
    return sum(group['lr'] for group in groups) / len(groups)


def clip_gradients(accelerator: Accelerator, task: TrainingTask, value: float, mode: str) -> None:
    """Clip the gradients of one update by norm, by value or adaptively (``agc``, which leaves out the classifier)."""
    parameters = task.get_clip_parameters(exclude_head=mode == 'agc')
    if mode == 'norm':
        accelerator.clip_grad_norm_(parameters, value)
        return
    accelerator.unscale_gradients()
    dispatch_clip_grad(parameters, value=value, mode=mode)
