"""A training run from top to bottom: data, model, task, optimizer, resume, epochs, evaluation, checkpoint, result.

What is trained is a `Problem`: images with classes (`Classification`) or with boxes (`detection.problem.Detection`).
Every process of a launch runs the same lines; Accelerate shares the batches out and sums the gradients.
"""
import contextlib
import math
import time
from typing import Any, Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm

from timm_spinal.errors import StopRequested, UserError, dead_workers_named

from .batches import on_device, pin_memory
from .checkpoint import find_checkpoints, restore, save
from .distributed import (
    Meter,
    NotFinite,
    SignalFlag,
    create_accelerator,
    on_any_process,
    on_main_process,
    set_backends,
    share_statistics,
)
from .optim import clip_gradients, create_optimizer, create_scheduler, mean_lr, resolve_lr
from .regression import problem_of
from .report import log_epoch, log_progress, plan_lines, progress_bar, write_first_files
from .results import whole_weights, write_result
from .run import ConfigT, Problem, Progress, Run
from .run_dir import claim_run_folder
from .sharded import prepare, sharding_errors_named
from .transforms import preserved_rng


def train(
        config: ConfigT,
        after_epoch: Callable[[Run[ConfigT]], None] | None = None,
        problem: type[Problem] | None = None,
) -> dict[str, Any]:
    """Train a model as a config says, and write its run folder.

    Every process of a launch calls it. Random states, thread and process settings stay as the run leaves them.

    Args:
        config: The run's config.
        after_epoch: Called by every process after the reports of each epoch.
        problem: What is trained; not given: classification, or regression where the config says so.

    Returns:
        The content of ``result.json``; see `Classification.result`.

    Raises:
        UserError: Anything a user can mend; one line.
        StopRequested: SIGINT or SIGTERM; a checkpoint has been written.
    """
    with open_run(config, problem) as run:
        train_epochs(run, after_epoch)
        return write_result(run)


@contextlib.contextmanager
def open_run(config: ConfigT, problem: type[Problem] | None = None) -> Iterator[Run[ConfigT]]:
    """A run before its next update. Trackers, memory and the run folder are released at the end, whatever happens.

    Raises:
        UserError: A loader worker was killed, and what `prepare_run` raises.
    """
    problem = problem or problem_of(config)
    accelerator = create_accelerator(config, problem.need_whole_weights(config))
    with sharding_errors_named(accelerator), contextlib.ExitStack() as held:
        try:
            with dead_workers_named(lambda: 'run it again'):
                run = prepare_run(config, problem, accelerator, held)
            with dead_workers_named(lambda: f'continue with --resume auto --experiment {run.folder.name}'):
                yield run
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.free_memory()


# ---- before the first update ------------------------------------------------------------------------------------


def prepare_run(
        config: ConfigT,
        kind: type[Problem],
        accelerator: Accelerator,
        held: contextlib.ExitStack,
) -> Run[ConfigT]:
    """Make everything that the loop works on, put a checkpoint back when resuming, and write the first files.

    Nothing is written before; the run folder is locked until ``held`` is closed.
    """
    # data
    problem = kind(config, accelerator)
    config = problem.config

    # model
    set_backends(config, accelerator.device, kind.same_shapes)
    set_seed(config.seed)
    with accelerator.main_process_first():
        model = problem.create_model(accelerator)
    problem.create_data(model, accelerator)
    pin_memory(problem.data.loaders, accelerator.device)
    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    folder, checkpoint = on_main_process(accelerator, lambda: claim_run_folder(
        config, problem.name, problem.describe(), held))
    model.to(accelerator.device)

    # task
    task = problem.create_task(model, accelerator, resuming=checkpoint is not None)

    # optimizer, moving average and schedule
    images = config.batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    optimizer = create_optimizer(config, task.trained, resolve_lr(config, images))
    task.setup_average(config)

    # prepare
    task.trainable_module, optimizer, train_loader, eval_loader = prepare(
        accelerator, task.trained, optimizer, problem.data.train_loader, problem.data.eval_loader)
    scheduler, epochs = create_scheduler(
        config, optimizer, math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps))
    run = Run(config, problem, accelerator, folder, task, optimizer, scheduler, epochs, train_loader, eval_loader)

    # resume
    if checkpoint is not None:
        run.progress = Progress.from_checkpoint(checkpoint, accelerator)
    task.set_length(epochs, len(train_loader), accelerator.gradient_accumulation_steps)
    task.start_epoch(run.progress.epoch, run.progress.batch, len(train_loader))
    problem.before_training(run, resuming=checkpoint is not None)
    for line in plan_lines(run):
        accelerator.print(line)
    set_seed(config.seed, device_specific=True)
    if checkpoint is not None:
        restore(run, checkpoint)  # nothing draws random numbers between this and the first update
    with preserved_rng():
        write_first_files(run)
    return run


# ---- epochs -----------------------------------------------------------------------------------------------------


def train_epochs(run: Run, after_epoch: Callable[[Run], None] | None = None) -> None:
    """Train to the last epoch, or until the metric has not improved for ``early_stop_patience`` evaluations.

    Raises:
        UserError: NaN or infinite loss, unreadable image, full disk. The last good checkpoint is kept.
        StopRequested: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    progress, drawn_at = run.progress, time.monotonic()
    with SignalFlag() as flag:
        while progress.epoch < run.last_epoch and not progress.stopped_early:
            try:
                row = dict(epoch=progress.epoch, **train_epoch(run, flag))
                if (progress.epoch + 1) % run.config.val_interval == 0 or progress.epoch + 1 == run.last_epoch:
                    evaluate_epoch(run, row)
                row['seconds'] = progress.seconds
                if run.scheduler is not None:
                    run.scheduler.step(progress.epoch + 1, row.get(f'eval_{run.problem.metric}'))
                progress.end_epoch(row)
                save(run)
            except NotFinite as e:
                good = find_checkpoints(run.folder / 'last')
                kept = f'the last good checkpoint is {good[0]}' if good else 'no checkpoint had been written yet'
                raise UserError(f'{e}: training stopped; {kept}; lower --lr or set --clip-grad') from e
            drawn_at = log_epoch(run, drawn_at)
            if after_epoch is not None:
                after_epoch(run)
            if signum := flag.agreed(run.accelerator):
                raise StopRequested(signum)


def train_epoch(run: Run, flag: SignalFlag) -> dict[str, float]:
    """Train the rest of the current epoch; returns ``train_*`` means, learning rate and speed for the summary.

    Raises:
        NotFinite: A loss was NaN or infinite.
        StopRequested: A signal came; a checkpoint has been written.
    """
    accelerator, config, progress = run.accelerator, run.config, run.progress
    batches, first, lr = len(run.train_loader), progress.batch, mean_lr(run.optimizer)
    loader, meter = epoch_batches(run), Meter(accelerator, progress.sums)
    with progress_bar(run) as bar:
        mark = time.perf_counter()
        for batch, (images, target, *given) in enumerate(loader, start=first):
            train_batch(run, meter, batch, images, target, *given)
            if not accelerator.sync_gradients:
                continue
            lr = mean_lr(run.optimizer)
            progress.updates, progress.batch = progress.updates + 1, batch + 1
            if not accelerator.optimizer_step_was_skipped:
                run.task.update_ema(step=progress.updates)
            meter.close(progress.updates)
            if run.scheduler is not None:
                run.scheduler.step_update(progress.updates)
            signum = flag.agreed(accelerator, progress.updates)
            due = bool(signum or config.checkpoint_steps and progress.updates % config.checkpoint_steps == 0)
            if due or progress.updates % config.log_interval == 0:
                meter.flush()  # here, and nowhere between, the process waits for its device
            mark = progress.count_time(mark)
            log_progress(run, bar, meter, lr)
            if due and batch + 1 < batches:
                save(run)
                mark = time.perf_counter()
                if signum:
                    raise StopRequested(signum)
        meter.flush()
        progress.count_time(mark)
    if first < batches:
        share_statistics(accelerator, run.task, run.optimizer, config.dist_bn)
    if signum := flag.agreed(accelerator):
        save(run)
        raise StopRequested(signum)
    speed = progress.sums['images'] / max(progress.epoch_seconds, 1e-9)
    return {**{f'train_{k}': v for k, v in meter.means().items()}, 'lr': lr, 'images_per_second': speed}


def epoch_batches(run: Run) -> Iterator[tuple]:
    """Start the current epoch, with the model in train mode; the batches of it that are not done."""
    progress, loader = run.progress, run.train_loader
    run.data.set_epoch(progress.epoch)
    run.task.train()
    run.task.start_epoch(progress.epoch, progress.batch, len(loader))
    run.task.frozen.begin_epoch(progress.epoch, backward=run.accelerator.num_processes > 1)
    run.optimizer.zero_grad()
    if progress.batch:
        loader = run.accelerator.skip_first_batches(loader, progress.batch)
    try:
        yield from on_device(loader, run.accelerator.device)
    except UserError as e:  # of the data of this process; the others do not know of it
        e.local = True  # type: ignore[attr-defined]
        raise


def train_batch(
        run: Run,
        meter: Meter,
        batch: int,
        images: torch.Tensor,
        target: torch.Tensor,
        *given: torch.Tensor,
) -> None:
    """Forward and backward of one batch; the optimizer steps when it is the last one of its update.

    What the loader gives beside images and targets (logits of a teacher) goes to the task as it is.
    """
    config, accelerator, task, optimizer = run.config, run.accelerator, run.task, run.optimizer
    accum = accelerator.gradient_accumulation_steps
    window = min(accum, len(run.train_loader) - batch // accum * accum)  # batches of this update: the last has fewer
    images, target, *rest = run.data.to_batch(images, target, *given)
    with accelerator.accumulate(task.trained):
        with accelerator.autocast():
            parts = task(images, target, *rest)
        meter.add({k: v for k, v in parts.items() if k != 'output'}, len(images))
        loss = parts['loss'] * (accum / window)  # backward() divides by accum
        if accelerator.sync_gradients:
            for name, penalty in task.penalties.items():
                value = penalty()
                meter.add_penalty(name, value)
                loss = loss + value * accum
        second_order = getattr(optimizer.optimizer, 'is_second_order', False)
        accelerator.backward(loss, **(dict(create_graph=True) if second_order else {}))
        run.task.frozen.drop_gradients()
        if accelerator.sync_gradients and config.clip_grad is not None:
            clip_gradients(accelerator, task, config.clip_grad, config.clip_mode)
        optimizer.step()
        optimizer.zero_grad()


def evaluate_epoch(run: Run, row: dict[str, Any]) -> None:
    """Evaluate the model, and its moving average where that can be; write the weights if they are the best so far.

    The row of the epoch gets ``eval_*`` and ``ema_*``.
    """
    problem, progress, accelerator = run.problem, run.progress, run.accelerator
    measured = {}
    for split in ('eval', 'ema') if run.task.has_ema() and not run.config.model_ema_force_cpu else ('eval',):
        model = run.task.evaluated(ema=split == 'ema')
        metrics = measured[split] = problem.evaluate(run, model, run.eval_loader, split)
        progress.eval_seconds += metrics['seconds']
        row.update({f'{split}_{k}': metrics[k] for k in problem.metrics})
        if metrics.get('nonfinite'):
            title = 'validation of EMA' if split == 'ema' else 'validation'
            accelerator.print(f'warning: {title}: NaN or infinite logits for {metrics["nonfinite"]} of '
                              f'{metrics["images"]} images')
    if weights := progress.update_best(row, problem.metric, run.config.keep):
        metrics = measured['ema' if weights == 'ema' else 'eval']
        progress.best['same_answer'] = metrics.get('same_answer')
        model, state_dict = whole_weights(run, weights)
        on_main_process(accelerator, lambda: problem.save_best(run.folder, model, state_dict, metrics))
    progress.stopped_early = on_any_process(accelerator, 0 < run.config.early_stop_patience <= progress.stale)
