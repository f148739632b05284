"""The processes of a launch: the accelerator, decisions of the main process, sums of losses, signals to stop."""
import math
import os
import signal
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    broadcast_object_list,
)
from timm.task import TrainingTask
from timm.utils import distribute_bn

from timm_spinal.errors import UserError

from .config import LoopConfig
from .sharded import check_sharding, refuse_launch

SIGNAL_STEPS = 10  # updates from one agreement of several processes on signals to the next
MIN_SCALE = 1.  # of fp16's losses; below it gradients that overflow are no fault of the scale


# ---- accelerator ------------------------------------------------------------------------------------------------


def new_accelerator(
        mixed_precision: str | None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        **kwargs: Any,
) -> Accelerator:
    """An `Accelerator` in which everything that is left open is up to ``accelerate config`` or ``accelerate launch``.

    A process may make several, one after the other; Accelerate keeps the precision of the first.

    Args:
        mixed_precision: 'no', 'fp16', 'bf16' or 'fp8'.
        dynamo_plugin: How models are compiled.
        kwargs: Further arguments of `Accelerator`.

    Raises:
        UserError: A precision, plugin or tracker that is not available, or another precision than the process has.
    """
    # given, so that what is open is not that of the accelerator before it
    mixed_precision = mixed_precision or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no').lower()
    dynamo_plugin = dynamo_plugin or TorchDynamoPlugin()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, dynamo_plugin=dynamo_plugin, **kwargs)
    except (ValueError, ImportError) as e:
        if 'already been initialized' in str(e):
            raise UserError(f'--mixed-precision {mixed_precision}: Accelerate has already set another precision in '
                            'this process; start a new process') from e
        raise UserError(f'accelerate: {" ".join(str(e).split())}') from e
    accelerator.state.dynamo_plugin = dynamo_plugin  # Accelerate keeps that of the first one too
    return accelerator


def create_accelerator(config: LoopConfig, need_whole_weights: list[tuple[bool, str]]) -> Accelerator:
    """The `Accelerator` of a run.

    Args:
        config: The run's config.
        need_whole_weights: Options that do not go with sharded weights: whether each was asked for, and its flag.

    Raises:
        UserError: Trackers or precision that are not available; a kind of sharding that is not supported, or options
            that do not go with it.
    """
    refuse_launch()
    kwargs: dict[str, Any] = dict(
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, broadcast_buffers=not config.no_ddp_bb, static_graph=config.ddp_static_graph,
        )],
    )
    if config.grad_accum_steps > 1:  # the plugin wins over the environment, the plain argument does not
        kwargs['gradient_accumulation_plugin'] = GradientAccumulationPlugin(num_steps=config.grad_accum_steps)
    if backend := getattr(config, 'torchcompile', None):
        kwargs['dynamo_plugin'] = TorchDynamoPlugin(backend=backend, mode=getattr(config, 'torchcompile_mode', None))
    # the folder of the trackers is not known yet, and nothing is written before it is
    accelerator = new_accelerator(config.mixed_precision, log_with=config.log_with or None, project_dir='.', **kwargs)
    if missing := set(config.log_with) - {str(tracker) for tracker in accelerator.log_with} - {'all'}:
        raise UserError(f'--log-with {" ".join(sorted(missing))}: its package is not installed; install it')
    check_sharding(accelerator, config, need_whole_weights)
    if config.ddp_static_graph and accelerator.gradient_accumulation_steps > 1:
        raise UserError('--ddp-static-graph: does not go with gradient accumulation, where only some batches share '
                        'their gradients; leave one of them out')
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise UserError(f'--sync-bn: torch has it on CUDA only, not on {accelerator.device.type}; leave it out')
    return accelerator


def set_backends(config: LoopConfig, device: torch.device, same_shapes: bool) -> None:
    """Let a CUDA device choose fast kernels, for the rest of the process, as timm does.

    Args:
        config: Its ``matmul_precision``.
        device: Nothing changes unless it is a CUDA device.
        same_shapes: All batches have the same shape, so that cuDNN may try which convolution is the fastest for it;
            not where deterministic algorithms are asked for.
    """
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = same_shapes and not torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.allow_tf32 = config.matmul_precision != 'highest'
        torch.set_float32_matmul_precision(config.matmul_precision)


def used_precision(config: LoopConfig, accelerator: Accelerator) -> str | None:
    """``mixed_precision`` of a config, or what accelerate is configured to where that is not its own default."""
    used = accelerator.mixed_precision
    return config.mixed_precision or (used if used != 'no' else None)


# ---- decisions --------------------------------------------------------------------------------------------------


def on_main_process(accelerator: Accelerator, choose: Callable[[], Any]) -> Any:
    """Call a function on the main process; every process gets its answer, or the same `UserError`."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = choose()
        except UserError as e:
            answer[1] = str(e)
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def on_any_process(accelerator: Accelerator, condition: bool) -> bool:
    """Whether a condition holds on any process; every process gets the same answer."""
    return over_processes(accelerator, [condition], highest=True) != [0.]


def over_processes(accelerator: Accelerator, values: Sequence[float], highest: bool = False) -> list[float]:
    """Sums of numbers over all processes, or the highest of each. The processes wait for each other, not for a device.

    Args:
        accelerator: Of the run. Every process must call it, with as many numbers.
        values: Of this process.
        highest: Maxima in place of sums.
    """
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    numbers = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized():  # TPUs
        every = accelerator.gather(numbers.to(accelerator.device, torch.float32)[None])
        return (every.amax(0) if highest else every.sum(0)).tolist()
    group = dist.group.WORLD if accelerator.device.type == 'cpu' else _cpu_group(dist.group.WORLD)
    dist.all_reduce(numbers, dist.ReduceOp.MAX if highest else dist.ReduceOp.SUM, group)
    return numbers.tolist()


@lru_cache
def _cpu_group(world: Any) -> Any:
    """The processes of the launch as a group that talks about numbers on the CPU."""
    return dist.new_group(backend='gloo')


def share_statistics(accelerator: Accelerator, task: TrainingTask, optimizer: Any, how: str) -> None:
    """After the training part of an epoch: the same weights and BatchNorm statistics on every process.

    Args:
        accelerator: Of the run.
        task: Its task.
        optimizer: Prepared.
        how: ``reduce`` (the mean of all processes), ``broadcast`` (of the main process) or ``''``.
    """
    if hasattr(optimizer.optimizer, 'sync_lookahead'):
        optimizer.optimizer.sync_lookahead()
    world = accelerator.num_processes
    if world > 1 and how:
        distribute_bn(task.get_trainable_module(), world, reduce=how == 'reduce')
        if task.has_ema():
            # the average of the main process is the one that checkpoints hold
            distribute_bn(task.get_trainable_module(ema=True), world, reduce=False)


# ---- signals ----------------------------------------------------------------------------------------------------


class SignalFlag:
    """Context in which SIGINT and SIGTERM only set `signum`; the handlers before it come back at its end.

    A launcher may repeat the signal, so later ones are ignored. `accelerate launch` of a single process does not pass
    SIGTERM on: that it is gone counts as SIGTERM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._signum = 0
        self._launcher = _launcher()
        self._before: dict[int, object] = {}

    @property
    def signum(self) -> int:
        """The first signal that came, or 0."""
        if not self._signum and self._launcher and os.getppid() != self._launcher:
            self._signum = signal.SIGTERM
        return self._signum

    def agreed(self, accelerator: Accelerator, update: int = 0) -> int:
        """The first signal that came to any process, or 0; every process of a launch gets the same answer.

        Args:
            accelerator: Of the run.
            update: Updates done. Several processes ask each other after every `SIGNAL_STEPS` of them, and after 0.
        """
        if accelerator.num_processes == 1:
            return self.signum
        if update % SIGNAL_STEPS:
            return 0
        came = over_processes(accelerator, [self.signum == number for number in self.SIGNALS], highest=True)
        return next((int(number) for number, any_process in zip(self.SIGNALS, came) if any_process), 0)

    def __enter__(self) -> 'SignalFlag':
        try:
            self._before = {s: signal.signal(s, self._set) for s in self.SIGNALS}
        except ValueError:  # not the main thread: signals stay with whoever called us
            self._before = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self._signum = self._signum or signum


def _launcher() -> int:
    """Process id of the `accelerate launch` that started this process; 0 when there is none or it is not known."""
    try:
        command = Path(f'/proc/{os.getppid()}/cmdline').read_bytes().split(b'\0')
    except OSError:
        return 0
    return os.getppid() if any(b'accelerate' in part for part in command[:3]) else 0


# ---- losses -----------------------------------------------------------------------------------------------------


class NotFinite(UserError):
    """A loss or a weight is NaN or infinite."""


class Meter:
    """Sums the parts of the loss over an epoch.

    Losses stay on the device until `flush` reads all of them at once and sums them over the processes. So a device
    never idles for them between two log lines. A NaN is noticed by then, and before anything is saved.

    Args:
        accelerator: Sums over its processes.
        sums: Sums of the epoch so far, by name, with ``images`` and, under fp16, ``overflowed``, the images among them
            whose loss was not finite and is in no sum (from a checkpoint; changed in place).
    """

    def __init__(self, accelerator: Accelerator, sums: dict[str, float]):
        self.accelerator = accelerator
        self.sums = sums
        self.last: dict[str, float] = {}  # means of the last update that was read
        self._window: list[tuple[str, torch.Tensor, int]] = []  # losses of the current update and their images
        self._images = 0
        self._updates: list[tuple[int, int, list[tuple[str, torch.Tensor, int]]]] = []

    def add(self, parts: dict[str, torch.Tensor], images: int) -> None:
        """Count one micro-batch: mean losses by name and the number of images."""
        self._window += [(name, value.detach(), images) for name, value in parts.items()]
        self._images += images

    def add_penalty(self, name: str, value: torch.Tensor) -> None:
        """Count a penalty of the update that `close` is about to end."""
        self._window.append((name, value.detach(), self._images))

    def close(self, update: int) -> None:
        """End an update."""
        self._updates.append((update, self._images, self._window))
        self._window, self._images = [], 0

    def flush(self) -> None:
        """Read the updates since the last call.

        Raises:
            NotFinite: A loss was NaN or infinite, and there is no scaler of fp16 that may still make up for it.
        """
        updates, self._updates = self._updates, []
        if not updates:
            return
        losses = [value for _, _, window in updates for _, value, _ in window]
        values = iter(torch.stack(losses).tolist())
        rows: list[dict[str, float]] = []
        for _, count, window in updates:
            row = dict(images=float(count))
            for name, _, images in window:
                row[name] = row.get(name, 0.) + next(values) * images
            rows.append(row)
        numbers = iter(over_processes(self.accelerator, [number for row in rows for number in row.values()]))
        for (update, _, _), row in zip(updates, rows):
            self._count(update, {name: next(numbers) for name in row})

    def means(self) -> dict[str, float]:
        """Mean per image of each part since the start of the epoch; NaN where no loss was finite."""
        counts = ('images', 'overflowed')
        images = self.sums.get('images', 0.) - self.sums.get('overflowed', 0.)
        return {k: value / images if images else math.nan for k, value in self.sums.items() if k not in counts}

    def _count(self, update: int, row: dict[str, float]) -> None:
        images = row['images']
        self.last = {name: value / images for name, value in row.items() if name != 'images'}
        bad = next((name for name, value in self.last.items() if not math.isfinite(value)), None)
        if bad:
            check_scaler(self.accelerator, f'{bad} is {self.last[bad]} at update {update}')
            row = dict.fromkeys(self.last, 0.) | dict(images=images, overflowed=images)
        for name, value in row.items():
            self.sums[name] = self.sums.get(name, 0.) + value


def check_scaler(accelerator: Accelerator, what: str) -> None:
    """Refuse to go on after a loss that is not finite, unless a scaler of fp16 leaves such updates out.

    Raises:
        NotFinite: There is none, or it has given up: its scale is below `MIN_SCALE`.
    """
    scaler = accelerator.scaler
    if scaler is None and accelerator.mixed_precision != 'fp16':  # DeepSpeed has its own, which stops by itself
        raise NotFinite(what)
    if scaler is not None and scaler.get_scale() < MIN_SCALE:
        raise NotFinite(f'{what}, and the loss scale of fp16 has fallen to {scaler.get_scale():g}')
