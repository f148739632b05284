"""The training loop: epochs of updates, evaluation, schedule, checkpoints. Everything it uses is made in `run.py`."""
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Generic, Iterable, Iterator, TypeVar

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.errors import UserError
from timm_spinal.models.fill_weights import LoadedWeights

from .checkpoint import find_checkpoints, save_checkpoint
from .config import LoopConfig
from .data import TrainData
from .freeze import HeadFirst
from .meter import Meter, NotFinite
from .optim import clip_gradients, scheduler_state
from .progress import Progress
from .report import epoch_title
from .signals import SignalFlag, StopRequested
from .task import Penalty
from .wld import WLDTask

ConfigT = TypeVar('ConfigT', bound=LoopConfig)


@dataclass
class Run(Generic[ConfigT]):
    """Everything the loop works on; loaders, optimizer and the task's trainable module are prepared."""
    config: ConfigT
    metric: str  # of the best epoch
    measured: tuple[str, ...]  # what `measure` gives for summary.csv, the metric among it
    measure: Callable[[nn.Module, DataLoader, str], dict[str, Any]]  # of a model over a loader; title of the bar
    accelerator: Accelerator
    folder: Path
    task: TrainingTask
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler | None
    epochs: int  # of the schedule
    data: TrainData
    train_loader: DataLoader
    eval_loader: DataLoader
    description: dict[str, Any]  # config and data, for checkpoints
    on_best: Callable[['Run', str], None]  # write the weights, 'model' or 'ema'
    on_epoch: Callable[['Run'], None]  # write the reports
    cwd: str = field(default_factory=os.getcwd)  # where relative paths of the config start
    penalties: dict[str, Penalty] = field(default_factory=dict)
    kept_in_eval: list[nn.Module] = field(default_factory=list)
    head_first: HeadFirst = field(default_factory=HeadFirst)
    signs: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # of the binary weights at the start
    progress: Progress = field(default_factory=Progress)
    weights: LoadedWeights | None = None  # that the model started from
    same_answer: dict[str, list[int] | None] = field(default_factory=dict)  # of the last evaluation, see `SameAnswer`
    drawn_at: float = field(default_factory=time.monotonic)  # when the curves were last drawn
    after_epoch: Callable[['Run'], None] | None = None  # what a caller of the trainer adds

    @property
    def last_epoch(self) -> int:
        """Epochs after which the run ends, unless it stops early."""
        return min(self.epochs, self.config.stop_epoch or self.epochs)


def trainable(task: TrainingTask) -> nn.Module:
    """The module that the optimizer trains, prepared."""
    module = task.get_trainable_module()
    assert module is not None
    return module


def eval_model(task: TrainingTask, ema: bool = False) -> nn.Module:
    """The model that a task evaluates; with ``ema`` its average, which must have been set up."""
    model = task.get_eval_model(ema=ema)
    assert model is not None
    return model


def fit(run: Run) -> None:
    """Train to the last epoch, or until the metric has not improved for ``early_stop_patience`` evaluations.

    Raises:
        UserError: NaN or infinite loss, unreadable image, full disk. The last good checkpoint is kept.
        StopRequested: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    config, progress = run.config, run.progress
    with SignalFlag() as flag:
        while progress.epoch < run.last_epoch and not progress.stopped_early:
            try:
                row = dict(epoch=progress.epoch, **train_epoch(run, flag))
                if (progress.epoch + 1) % config.val_interval == 0 or progress.epoch + 1 == run.last_epoch:
                    row.update(_evaluate_epoch(run))
                    if weights := progress.judge(row, run.metric, config.keep):
                        progress.best['same_answer'] = run.same_answer['ema' if weights == 'ema' else 'eval']
                        run.on_best(run, weights)
                    patience = config.early_stop_patience
                    progress.stopped_early = _any(run, bool(patience) and progress.stale >= patience)
                row['seconds'] = progress.seconds
                if run.scheduler is not None:
                    run.scheduler.step(progress.epoch + 1, row.get(f'eval_{run.metric}'))
                progress.end_epoch(row)
                save(run)
            except NotFinite as e:
                good = find_checkpoints(run.folder / 'last')
                kept = f'the last good checkpoint is {good[0]}' if good else 'no checkpoint had been written yet'
                raise UserError(f'{e}: training stopped; {kept}; lower --lr or set --clip-grad') from e
            run.on_epoch(run)
            if run.after_epoch is not None:
                run.after_epoch(run)
            if _any(run, flag.signum != 0):
                raise StopRequested(flag.signum or signal.SIGTERM)


def train_epoch(run: Run, flag: SignalFlag) -> dict[str, float]:
    """Train the rest of the current epoch; returns ``train_*`` means, learning rate and speed for the summary.

    Raises:
        NotFinite: A loss was NaN or infinite.
        StopRequested: A signal came; a checkpoint has been written.
    """
    accelerator, progress, batches = run.accelerator, run.progress, len(run.train_loader)
    steps = run.config.checkpoint_steps
    meter = Meter(accelerator, flag, progress.sums)
    loader, first = _start_epoch(run), progress.batch
    lr = _lr(run)
    with _bar(run, batches) as bar:
        mark = time.perf_counter()
        for batch, (images, target, *given) in enumerate(_batches(loader), start=first):
            _micro_step(run, meter, images, target, batch, batches, *given)
            if not accelerator.sync_gradients:
                continue
            lr = _lr(run)
            _end_update(run, meter, batch)
            now = time.perf_counter()
            progress.epoch_seconds, mark = progress.epoch_seconds + now - mark, now
            _tell(run, bar, meter, lr)
            due = bool(steps) and progress.updates % steps == 0
            if (due or meter.signum) and batch + 1 < batches:
                save(run, meter)
                mark = time.perf_counter()
                if meter.signum:
                    raise StopRequested(meter.signum)
        meter.settle()
    if first < batches:
        _end_training_part(run)
    if meter.signum:
        save(run, meter)
        raise StopRequested(meter.signum)
    speed = progress.sums['images'] / max(progress.epoch_seconds, 1e-9)
    return {**{f'train_{k}': v for k, v in meter.means().items()}, 'lr': lr, 'images_per_second': speed}


def _start_epoch(run: Run) -> Iterable:
    """The loader of the current epoch, past the batches that are done, with the model in train mode."""
    epoch, loader = run.progress.epoch, run.train_loader
    run.data.set_epoch(epoch)
    run.task.train()
    if isinstance(run.task, WLDTask):
        run.task.batches = epoch * len(loader) + run.progress.batch
    for module in run.kept_in_eval:
        module.eval()
    run.head_first.begin_epoch(epoch, backward=run.accelerator.num_processes > 1)
    run.optimizer.zero_grad()
    if run.progress.batch:
        return run.accelerator.skip_first_batches(loader, run.progress.batch)
    return loader


def _micro_step(
        run: Run,
        meter: Meter,
        images: torch.Tensor,
        target: torch.Tensor,
        batch: int,
        batches: int,
        *given: torch.Tensor,
) -> None:
    """Forward and backward of one batch; the optimizer steps when it is the last one of its update.

    What the loader gives beside images and targets (logits of a teacher) goes to the task as it is.
    """
    config, accelerator, task = run.config, run.accelerator, run.task
    accum = accelerator.gradient_accumulation_steps
    window = min(accum, batches - batch // accum * accum)  # batches of this update: fewer in the last one
    images, target = run.data.to_batch(images, target)
    with accelerator.accumulate(trainable(task)):
        with accelerator.autocast():
            parts = task(images, target, *given)
        meter.add({k: v for k, v in parts.items() if k != 'output'}, len(images))
        loss = parts['loss'] * (accum / window)  # backward() divides by accum
        if accelerator.sync_gradients:
            for name, penalty in run.penalties.items():
                value = penalty()
                meter.add_penalty(name, value)
                loss = loss + value * accum
        second_order = getattr(run.optimizer.optimizer, 'is_second_order', False)
        accelerator.backward(loss, **(dict(create_graph=True) if second_order else {}))
        run.head_first.drop_gradients()
        if accelerator.sync_gradients and config.clip_grad is not None:
            clip_gradients(accelerator, task, config.clip_grad, config.clip_mode)
        run.optimizer.step()
        run.optimizer.zero_grad()


def _end_update(run: Run, meter: Meter, batch: int) -> None:
    progress = run.progress
    progress.updates, progress.batch = progress.updates + 1, batch + 1
    if not run.accelerator.optimizer_step_was_skipped:
        run.task.update_ema(step=progress.updates)
    meter.close(progress.updates)
    if run.scheduler is not None:
        run.scheduler.step_update(progress.updates, metric=meter.last.get('loss'))


def _end_training_part(run: Run) -> None:
    if hasattr(run.optimizer.optimizer, 'sync_lookahead'):
        run.optimizer.optimizer.sync_lookahead()
    world = run.accelerator.num_processes
    if world > 1 and run.config.dist_bn:
        distribute_bn(trainable(run.task), world, reduce=run.config.dist_bn == 'reduce')
        if run.task.has_ema():
            # the average of the main process is the one that checkpoints hold
            distribute_bn(run.task.get_trainable_module(ema=True), world, reduce=False)


def _evaluate_epoch(run: Run) -> dict[str, float]:
    """Columns of the summary: ``eval_*``, and ``ema_*`` when the moving average is where it can be evaluated."""
    names = dict(eval='validation')
    if run.task.has_ema() and not run.config.model_ema_force_cpu:
        names['ema'] = 'validation of EMA'
    row = {}
    for name, title in names.items():
        model = eval_model(run.task, name == 'ema')
        metrics = run.measure(model, run.eval_loader, name)
        run.progress.eval_seconds += metrics['seconds']
        row.update({f'{name}_{k}': metrics[k] for k in run.measured})
        run.same_answer[name] = metrics.get('same_answer')
        if metrics.get('nonfinite'):
            run.accelerator.print(f'warning: {title}: NaN or infinite logits for {metrics["nonfinite"]} of '
                                  f'{metrics["images"]} images')
    return row


def save(run: Run, meter: Meter | None = None) -> None:
    """Write a checkpoint of the current state, unless a loss or a weight is NaN or infinite (`NotFinite`)."""
    if meter is not None:
        meter.settle()
    _check_weights(run)
    state = dict(
        progress=asdict(run.progress),
        scheduler=scheduler_state(run.scheduler),
        processes=run.accelerator.num_processes,
        cwd=run.cwd,
        **run.description,
    )
    ema = run.task.get_trainable_module(ema=True)
    save_checkpoint(
        run.accelerator, run.folder / 'last', run.progress.updates, state, ema, run.config.checkpoint_hist)


def _check_weights(run: Run) -> None:
    weights = [p.detach() for p in trainable(run.task).parameters() if p.numel()]
    bad = torch.stack([~weight.isfinite().all() for weight in weights]).sum()
    if run.accelerator.reduce(bad).item():
        raise NotFinite(f'a weight is NaN or infinite after update {run.progress.updates}')


def _any(run: Run, condition: bool) -> bool:
    """Whether the condition holds on any process."""
    if condition:
        run.accelerator.set_trigger()
    return run.accelerator.check_trigger()


def _batches(loader: Iterable) -> Iterator:
    """The batches of a loader; an error of the data is marked as belonging to this process only."""
    try:
        yield from loader
    except UserError as e:
        e.local = True  # type: ignore[attr-defined]
        raise


def _lr(run: Run) -> float:
    groups = run.optimizer.param_groups
    return sum(g['lr'] for g in groups) / len(groups)


def _bar(run: Run, batches: int) -> tqdm:
    accum = run.accelerator.gradient_accumulation_steps
    return tqdm(
        total=math.ceil(batches / accum),
        initial=math.ceil(run.progress.batch / accum),
        desc=epoch_title(run.progress.epoch, run.last_epoch),
        leave=False,
        disable=None if run.accelerator.is_main_process else True,  # None: only on a terminal
    )


def _tell(run: Run, bar: tqdm, meter: Meter, lr: float) -> None:
    bar.update()
    if run.progress.updates % run.config.log_interval:
        return
    meter.settle()
    progress = run.progress
    speed = progress.sums['images'] / progress.epoch_seconds
    values = {**{f'train/{k}': v for k, v in meter.last.items()}, 'lr': lr, 'images_per_second': speed}
    run.accelerator.log(values, step=progress.updates)
    text = f'training loss {meter.last["loss"]:.4f}, lr {lr:.3g}, {speed:.0f} images/s'
    bar.set_postfix_str(text)
    if bar.disable and run.accelerator.is_main_process:
        print(f'{epoch_title(progress.epoch, run.last_epoch)}, update {progress.updates}: {text}', flush=True)
