"""The processes of a launch: the accelerator, decisions of the main process, sums of losses, signals to stop."""
import math
import os
import signal
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, broadcast_object_list
from timm.task import TrainingTask
from timm.utils import distribute_bn

from timm_spinal.errors import UserError

from .config import LoopConfig
from .sharded import check_sharding, refuse_launch

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
    kwargs: dict[str, Any] = {}
    if config.grad_accum_steps > 1:  # the plugin wins over the environment, the plain argument does not
        kwargs['gradient_accumulation_plugin'] = GradientAccumulationPlugin(num_steps=config.grad_accum_steps)
    if backend := getattr(config, 'torchcompile', None):
        kwargs['dynamo_plugin'] = TorchDynamoPlugin(backend=backend, mode=getattr(config, 'torchcompile_mode', None))
    # the folder of the trackers is not known yet, and nothing is written before it is
    accelerator = new_accelerator(config.mixed_precision, log_with=config.log_with or None, project_dir='.', **kwargs)
    if missing := set(config.log_with) - {str(tracker) for tracker in accelerator.log_with} - {'all'}:
        raise UserError(f'--log-with {" ".join(sorted(missing))}: its package is not installed; install it')
    check_sharding(accelerator, config, need_whole_weights)
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise UserError(f'--sync-bn: torch has it on CUDA only, not on {accelerator.device.type}; leave it out')
    return accelerator


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
    if condition:
        accelerator.set_trigger()
    return accelerator.check_trigger()


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
    """Sums the parts of the loss over an epoch and passes signals from any process to all.

    Per update one small tensor (sums over images, images, SIGINT, SIGTERM) is summed over the processes. It is read
    when the next update has been queued, so a device never idles for it; a NaN is therefore noticed one update
    later, and before anything is saved.

    Args:
        accelerator: Sums over its processes.
        flag: The signals of this process.
        sums: Sums of the epoch so far, by name, with ``images`` (from a checkpoint; changed in place).
    """

    def __init__(self, accelerator: Accelerator, flag: SignalFlag, sums: dict[str, float]):
        self.accelerator = accelerator
        self.flag = flag
        self.sums = sums
        self.signum = 0
        self.last: dict[str, float] = {}
        self._window: dict[str, torch.Tensor] = {}
        self._images = 0
        self._queue: deque[tuple[int, list[str], torch.Tensor]] = deque()
        # MPS has no float64
        self._dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64

    def add(self, parts: dict[str, torch.Tensor], images: int) -> None:
        """Count one micro-batch: mean losses by name and the number of images."""
        for name, value in parts.items():
            value = value.detach().to(self._dtype) * images
            self._window[name] = self._window[name] + value if name in self._window else value
        self._images += images

    def add_penalty(self, name: str, value: torch.Tensor) -> None:
        """Count a penalty of the update that `close` is about to end."""
        self._window[name] = value.detach().to(self._dtype) * self._images

    def close(self, update: int) -> None:
        """End an update: queue its sums, and read those of the update before."""
        signals = [float(self.flag.signum == s) for s in SignalFlag.SIGNALS]
        counts = torch.tensor([self._images, *signals], dtype=self._dtype, device=self.accelerator.device)
        values = torch.cat([torch.stack(list(self._window.values())), counts])
        self._queue.append((update, list(self._window), self.accelerator.reduce(values)))
        self._window, self._images = {}, 0
        self._read(leave=1)

    def flush(self) -> None:
        """Read everything that is queued.

        Raises:
            NotFinite: A loss was NaN or infinite.
        """
        self._read(leave=0)

    def means(self) -> dict[str, float]:
        """Mean per image of each part since the start of the epoch."""
        images = max(self.sums.get('images', 0.), 1.)
        return {name: value / images for name, value in self.sums.items() if name != 'images'}

    def _read(self, leave: int) -> None:
        while len(self._queue) > leave:
            update, names, tensor = self._queue.popleft()
            *sums, images, sigint, sigterm = tensor.tolist()
            self.last = {name: value / images for name, value in zip(names, sums)}
            for name, value in self.last.items():
                if not math.isfinite(value):
                    raise NotFinite(f'{name} is {value} at update {update}')
            for name, value in zip([*names, 'images'], [*sums, images]):
                self.sums[name] = self.sums.get(name, 0.) + value
            for signum, count in zip(SignalFlag.SIGNALS, (sigint, sigterm)):
                if count:
                    self.signum = self.signum or int(signum)
