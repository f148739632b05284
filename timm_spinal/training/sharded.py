"""Weights of which each process holds a part (FSDP2): what goes with them, and how they are checked, kept and put back.

A parameter of a sharded model is a `DTensor`, of which this process holds ``to_local()``. Buffers are whole in every
process, and may differ until `distributed.share_statistics` makes them the same.
"""
import contextlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from safetensors.torch import load_file, save_file

from timm_spinal.errors import UserError

from .config import LoopConfig
from .optim import create_optimizer
from .transforms import preserved_rng

_INSTEAD = 'launch with --use_fsdp --fsdp_version 2, or with --multi_gpu'
# what shares weights out and cannot be used, by the variable that asks for it, and why
_REFUSED = {
    'ACCELERATE_USE_DEEPSPEED': (
        'DeepSpeed', 'accumulates and clips gradients by its own config, not by --grad-accum-steps and --clip-grad'),
    'ACCELERATE_USE_MEGATRON_LM': ('Megatron-LM', 'trains its own language models only'),
}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only."""
    return accelerator.distributed_type == DistributedType.FSDP


# ---- launches and options ---------------------------------------------------------------------------------------


def refuse_launch() -> None:
    """Refuse a launch whose processes would share the weights out in a way that the trainer does not support.

    Raises:
        UserError: DeepSpeed or Megatron-LM.
    """
    for variable, (name, reason) in _REFUSED.items():
        if _is_set(variable):
            raise UserError(f'{name} {reason}; {_INSTEAD}')


def check_sharding(
        accelerator: Accelerator,
        config: LoopConfig,
        need_whole_weights: list[tuple[bool, str]],
) -> None:
    """Set Accelerate's FSDP as this package needs it, and say so when it was asked for and does not run.

    Args:
        accelerator: New.
        config: The run's config.
        need_whole_weights: Options that do not go with sharded weights: whether each was asked for, and its flag.

    Raises:
        UserError: FSDP of version 1; options and optimizers that do not go with sharded weights.
    """
    if not is_sharded(accelerator):
        if _is_set('ACCELERATE_USE_FSDP'):
            accelerator.print('warning: FSDP does not run: Accelerate shards weights on GPUs only, not on '
                              f'{accelerator.device.type}, so all of them are in each of {accelerator.num_processes} '
                              'processes (DDP)')
        return
    clips_otherwise = config.clip_grad is not None and config.clip_mode != 'norm'
    for asked, flag in (
        (config.model_ema, '--model-ema'),
        (clips_otherwise, f'--clip-mode {config.clip_mode}'),
        *need_whole_weights,
    ):
        if asked:
            raise UserError(f'{flag} needs the whole weights on each device, which FSDP splits; leave it out, or '
                            'launch with --multi_gpu')
    if not is_elementwise(lambda module: create_optimizer(replace(config, layer_decay=None), module, lr=0.1)):
        raise UserError(f'--opt {config.opt} works on whole weights, which FSDP splits; use one that updates each '
                        'number by itself, such as sgd or adamw, or launch with --multi_gpu')
    if not accelerator.is_fsdp2:
        raise UserError(f'FSDP of version 1: PyTorch is giving it up, and it hides the shapes of weights; {_INSTEAD}')
    # with it, Accelerate takes buffers for sharded weights: no model with BatchNorm would start
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, '').lower() in ('true', '1', 'yes', 'y', 't', 'on')


def is_elementwise(create_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> bool:
    """Whether an optimizer updates the halves of a matrix as it updates the whole, so also what a process holds of it.

    False too for one that needs second derivatives, or has a state before its first step.

    Args:
        create_optimizer: Makes it for the parameters of a module.
    """
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(5, 64, 32, generator=generator)
    # AdamP and SGDP look for gradients orthogonal to their weights: here in the upper half
    upper = start[:32]
    gradients[0][:32] -= upper * ((gradients[0][:32] * upper).sum(1) / upper.square().sum(1))[:, None]

    def updated(rows: slice) -> torch.Tensor:
        layer = nn.Linear(32, len(start[rows]), bias=False)
        layer.weight.data = start[rows].clone()
        optimizer = create_optimizer(layer)
        # FSDP gives no second derivatives, and Accelerate loses a state from before the weights are sharded
        if getattr(optimizer, 'is_second_order', False) or optimizer.state:
            raise NotImplementedError
        for gradient in gradients:
            layer.weight.grad = gradient[rows].clone()
            optimizer.step()
        return layer.weight.data

    with preserved_rng():
        try:
            halves = torch.cat([updated(slice(0, 32)), updated(slice(32, 64))])
            return torch.allclose(halves, updated(slice(0, 64)), rtol=1e-5, atol=1e-6)
        except (RuntimeError, NotImplementedError):
            return False


# ---- preparation ------------------------------------------------------------------------------------------------


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, *loaders: Any) -> Any:
    """`Accelerator.prepare`; sharded weights start as those of the main process, as DDP's do."""
    if is_sharded(accelerator):
        for weight in module.parameters():
            weight.data = weight.data.contiguous()  # FSDP takes no others, so channels last is left to the images
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.copy_(broadcast(tensor.contiguous()))
    prepared = accelerator.prepare(module, optimizer, *loaders)
    if is_sharded(accelerator):
        accelerator.register_save_state_pre_hook(partial(_save_whole_tensors, prepared[0]))
        accelerator.register_load_state_pre_hook(partial(_load_whole_tensors, prepared[0]))
    return prepared


@contextlib.contextmanager
def sharding_errors_named(accelerator: Accelerator) -> Iterator[None]:
    """One line in place of torch's errors about models and operators that take no sharded weights.

    Raises:
        UserError: Gives the reason, and how to do without.
    """
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, AssertionError) as e:
        reason = ' '.join(str(e).split())
        if not is_sharded(accelerator) or not any(word in reason.lower() for word in ('dtensor', 'shard', 'fsdp')):
            raise
        raise UserError(f'FSDP: this model cannot be sharded so ({reason[:300]}); choose another '
                        '--fsdp_auto_wrap_policy, or launch with --multi_gpu') from e


# ---- weights ----------------------------------------------------------------------------------------------------


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; the tensor itself where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def load_whole(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Put whole weights into a sharded model. Every process calls it with all of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True))


# ---- checkpoints ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def errors_of_shards() -> Iterator[None]:
    """Raise the error of a process in the place of torch's CheckpointException, which is no `Exception`."""
    try:
        yield
    except BaseException as e:
        failures = getattr(e, 'failures', None)  # a process and its error with a traceback
        if not failures:
            raise
        raise next(iter(failures.values()))[0] from e


def _whole_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What of a state dict is not sharded, such as BatchNorm statistics, which are each process's own in an epoch."""
    return {name: value for name, value in model.state_dict().items() if not hasattr(value, 'to_local')}


def _file(folder: str, process: int | str) -> Path:
    return Path(folder) / f'whole_{process}.safetensors'


def _save_whole_tensors(model: nn.Module, models: list, weights: list, output_dir: str) -> None:
    """Hook of `Accelerator.save_state`, which keeps the statistics of one process only."""
    tensors = {name: value.detach().cpu().clone() for name, value in _whole_tensors(model).items()}
    save_file(tensors, _file(output_dir, torch.distributed.get_rank()))


def _load_whole_tensors(model: nn.Module, models: list, input_dir: str) -> None:
    """Hook of `Accelerator.load_state`. With another number of processes, all have those that Accelerate kept."""
    if len(list(Path(input_dir).glob(_file('', '*').name))) == torch.distributed.get_world_size():
        saved = load_file(_file(input_dir, torch.distributed.get_rank()))
        with torch.no_grad():
            for name, value in _whole_tensors(model).items():
                value.copy_(saved[name])
