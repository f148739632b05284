"""What a run consists of: what is trained (`Problem`), how far it is (`Progress`), and all of it (`Run`)."""
import math
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.scheduler.scheduler import Scheduler
from torch.utils.data import DataLoader

from timm_spinal.errors import UserError

from .checkpoint import other_version, read_state
from .config import LoopConfig
from .data import TrainData
from .run_dir import changed_since_checkpoint
from .task import Task

ConfigT = TypeVar('ConfigT', bound=LoopConfig)


class Problem(ABC, Generic[ConfigT]):
    """What differs from one kind of training to another: data, model, task and metrics. One is made for each run.

    Making it opens the data. `train.prepare_run` calls the methods in the order in which they stand here.

    Args:
        config: The run's config.
        accelerator: Its accelerator.

    Attributes:
        config: The config, with what the data and the accelerator have settled.
        name: What a run without ``experiment`` is called, after the time.
        data: Loaders and sizes; there from `create_data` on.
        metrics: What `evaluate` measures for ``summary.csv``.
        metric: The one that chooses the best epoch.
        same_shapes: All training batches have the same shape.
    """
    same_shapes = True
    config: ConfigT
    name: str
    data: TrainData
    metrics: tuple[str, ...]
    metric: str

    @abstractmethod
    def __init__(self, config: ConfigT, accelerator: Accelerator): ...

    @staticmethod
    def need_whole_weights(config: Any) -> list[tuple[bool, str]]:
        """Options that do not go with sharded weights: whether each was asked for, and its flag."""
        return []

    def create_model(self, accelerator: Accelerator) -> Any:
        """The model on the CPU, with the weights that it starts from; the main process says what became of them.

        A run that goes on from a checkpoint has all weights in it: it does not end for a file that has gone since, or
        that an older version took although it does not fit.

        Raises:
            UserError: The model cannot be made.
        """
        config, without = self.config, self.without_weights()
        try:
            model = self.build_model(config)
        except UserError as e:
            changed = changed_since_checkpoint(config)
            if changed is None or changed.keys() & without.keys():
                raise
            model = self.build_model(replace(config, **without))
            accelerator.print(f'resuming: the weights that the run started from are not checked again ({e})')
        if model.loaded_weights is not None:
            accelerator.print(f'weights {model.loaded_weights}', flush=True)
        return model

    @abstractmethod
    def build_model(self, config: ConfigT) -> Any:
        """The model of a config on the CPU; its ``loaded_weights`` say what became of the weights that it names."""

    @abstractmethod
    def without_weights(self) -> dict[str, Any]:
        """Options with which the config makes the same model without weights."""

    @abstractmethod
    def create_data(self, model: Any, accelerator: Accelerator) -> None:
        """Set `data`: loaders that fit the model, not prepared."""

    def describe(self) -> dict[str, Any]:
        """Config and data as a checkpoint remembers them, to refuse a resumption with others."""
        data = self.data
        names = sha256(repr(data.class_names).encode()).hexdigest()[:12]
        sizes = dict(
            train_size=data.train_size, eval_size=data.eval_size, num_classes=data.num_classes, class_names=names)
        return dict(config=asdict(self.config), data=sizes, augmented_on_device=data.augmented_on_device)

    @abstractmethod
    def create_task(self, model: Any, accelerator: Accelerator, resuming: bool) -> Task:
        """The task around the model, which is on its device."""

    def before_training(self, run: 'Run[ConfigT]', resuming: bool) -> None:
        """What needs the length of the run; weights of a checkpoint are put back after it."""

    @abstractmethod
    def evaluate(self, run: 'Run[ConfigT]', model: nn.Module, loader: DataLoader, split: str) -> dict[str, Any]:
        """`metrics`, ``images`` and ``seconds`` of a model over a prepared loader, the same on every process.

        Args:
            run: The run.
            model: The model, or its average.
            loader: Of the split.
            split: ``eval``, ``ema`` (the average on the same data) or ``test``.
        """

    @abstractmethod
    def save_best(
            self,
            folder: Path,
            model: Any,
            state_dict: dict[str, torch.Tensor],
            metrics: dict[str, Any],
    ) -> None:
        """Write the best weights so far. Called by the main process.

        Args:
            folder: The run folder.
            model: Unwrapped.
            state_dict: Its weights, whole.
            metrics: What `evaluate` gave for them.
        """

    @abstractmethod
    def result(self, run: 'Run[ConfigT]') -> dict[str, Any]:
        """The content of ``result.json``, without a test split. Every process calls it."""

    def write_pictures(self, run: 'Run[ConfigT]') -> list[Path]:
        """Draw what the best weights get wrong into the run folder. Called by the main process at the end."""
        return []

    @abstractmethod
    def how_to_load(self, run: 'Run[ConfigT]') -> str:
        """Code that loads the best weights."""


@dataclass
class Progress:
    """The counters of a run; JSON types only, part of every checkpoint."""
    epoch: int = 0  # epochs done
    batch: int = 0  # batches of each process done in the current epoch
    updates: int = 0
    images: int = 0  # training images of the epochs done, all processes
    sums: dict[str, float] = field(default_factory=dict)  # of the current epoch, see `Meter`
    epoch_seconds: float = 0.  # training time of the current epoch
    train_seconds: float = 0.  # training time of the epochs done, without evaluation and checkpoints
    eval_seconds: float = 0.
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0  # evaluations since the best one
    stopped_early: bool = False
    teacher_top1: float | None = None  # as --kd-check found it
    history: list[dict[str, Any]] = field(default_factory=list)  # rows of summary.csv

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, accelerator: Accelerator) -> 'Progress':
        """Where the run of a checkpoint was, in batches of the processes that there are now.

        Raises:
            UserError: The checkpoint is of another version.
        """
        state = read_state(checkpoint)
        try:
            progress = cls(**state['progress'])
        except (KeyError, TypeError) as e:
            raise other_version(checkpoint, e) from e
        progress.batch = batches_done(
            progress.batch, state['processes'], accelerator.num_processes, accelerator.gradient_accumulation_steps)
        return progress

    @property
    def seconds(self) -> float:
        """Training and evaluation time of the whole run, over all its resumptions."""
        return self.train_seconds + self.epoch_seconds + self.eval_seconds

    @property
    def images_per_second(self) -> float:
        """Training speed over the epochs done."""
        return self.images / self.train_seconds if self.train_seconds else 0.

    def count_time(self, since: float) -> float:
        """Count the training time since a moment of `time.perf_counter`; returns this moment."""
        now = time.perf_counter()
        self.epoch_seconds += now - since
        return now

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Close the current epoch with its row of the summary."""
        self.history.append(row)
        self.images += round(self.sums.get('images', 0))
        self.train_seconds += self.epoch_seconds
        self.epoch, self.batch, self.sums, self.epoch_seconds = self.epoch + 1, 0, {}, 0.

    def update_best(self, row: dict[str, Any], metric: str, keep: str = 'best') -> str:
        """Compare an evaluated epoch with the best one so far, and keep the better one.

        Args:
            row: Row of the summary, with ``eval_*`` and, when there is a moving average, ``ema_*``.
            metric: ``loss`` or ``mse`` (lower is better), or the name of an accuracy (higher is better).
            keep: ``last`` takes any epoch with finite outputs for better than those before it.

        Returns:
            Which weights are the new best, ``model`` or ``ema``; empty when there is no new best.
        """
        sign = -1 if metric in ('loss', 'mse') else 1
        best, chosen = None if keep == 'last' else self.best.get('value'), ''
        for weights, prefix in (('model', 'eval'), ('ema', 'ema')):
            value = row.get(f'{prefix}_{metric}')
            # a model that gives NaN for some images is never the best, whatever its accuracy on the others
            if value is None or not math.isfinite(row.get(f'{prefix}_loss', 0.)):
                continue
            if best is None or sign * value > sign * best:
                best, chosen = value, weights
                self.best = dict(epoch=row['epoch'], weights=weights, metric=metric, value=value)
                measured = {k.removeprefix(f'{prefix}_'): v for k, v in row.items() if k.startswith(f'{prefix}_')}
                self.best.update(measured)
        self.stale = 0 if chosen else self.stale + 1
        return chosen


def batches_done(batch: int, processes: int, now: int, accum: int) -> int:
    """Batches of each process that are done in an epoch, when it goes on with another number of processes.

    The same images are done, down to a whole update.

    Args:
        batch: Batches of each process that were done.
        processes: Processes there were.
        now: Processes there are.
        accum: Batches of an update.
    """
    if processes == now:
        return batch
    done = batch * processes // now
    return done - done % accum


@dataclass
class Run(Generic[ConfigT]):
    """Everything that the loop works on; loaders, optimizer and the task's trainable module are prepared."""
    config: ConfigT
    problem: Problem[ConfigT]
    accelerator: Accelerator
    folder: Path
    task: Task
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler | None
    epochs: int  # of the schedule
    train_loader: DataLoader
    eval_loader: DataLoader
    progress: Progress = field(default_factory=Progress)

    @property
    def data(self) -> TrainData:
        """The loaders before they were prepared, and what they are made of."""
        return self.problem.data

    @property
    def last_epoch(self) -> int:
        """Epochs after which the run ends, unless it stops early."""
        return min(self.epochs, self.config.stop_epoch or self.epochs)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates of an epoch; the last may have fewer batches than the others."""
        return math.ceil(len(self.train_loader) / self.accelerator.gradient_accumulation_steps)
