"""From the parts of a run to its first update: what every kind of training has in common; see `run.py` for one."""
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from timm.task import TrainingTask

from timm_spinal.errors import UserError

from . import report
from .agree import agree
from .checkpoint import choose_checkpoint, load_checkpoint, read_state
from .config import LoopConfig, to_yaml
from .data import TrainData
from .folder import run_folder
from .identity import SCHEDULE, SILENT, check_same_run
from .loop import ConfigT, Run, fit, trainable
from .optim import apply_settings, create_optimizer, create_scheduler, load_scheduler_state, resolve_lr
from .outcome import SHARDED
from .plan import plan_lines
from .progress import Progress, batches_done

Refused = list[tuple[bool, str]]  # whether an option was asked for, and its flag


def carry_out(
        accelerator: Accelerator,
        prepare: Callable[[], Run],
        finish: Callable[[Run], dict[str, Any]],
        after_epoch: Callable[[Run], None] | None = None,
        after_run: Callable[[Run, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Prepare a run, train it and finish it; returns its result. Trackers and memory are released whatever happens."""
    try:
        run = prepare()
        run.after_epoch = after_epoch
        fit(run)
        result = finish(run)
        if after_run is not None:
            after_run(run, result)
        return result
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()


def make_accelerator(config: LoopConfig, need_whole_weights: Refused, **kwargs: Any) -> Accelerator:
    """An `Accelerator` in which everything that the config leaves open is up to ``accelerate config`` or ``launch``.

    Args:
        config: The run's config.
        need_whole_weights: Further options that do not go with sharded weights.
        kwargs: Further arguments of `Accelerator`.

    Raises:
        UserError: Trackers or precision that are not available; options that do not go with sharded weights.
    """
    # the settings of a run before this one in the same process
    AcceleratorState._reset_state()
    if config.grad_accum_steps > 1:  # the plugin wins over the environment, the plain argument does not
        kwargs['gradient_accumulation_plugin'] = GradientAccumulationPlugin(num_steps=config.grad_accum_steps)
    try:
        # the folder of the trackers is not known yet, and nothing is written before it is
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=config.log_with or None, project_dir='.', **kwargs)
    except (ValueError, ImportError) as e:
        raise UserError(f'accelerate: {" ".join(str(e).split())}') from e
    if missing := set(config.log_with) - {str(tracker) for tracker in accelerator.log_with} - {'all'}:
        raise UserError(f'--log-with {" ".join(sorted(missing))}: its package is not installed; install it')
    sharded = accelerator.distributed_type in SHARDED
    for asked, flag in (
        (config.model_ema, '--model-ema'),
        (config.clip_grad is not None and config.clip_mode != 'norm', f'--clip-mode {config.clip_mode}'),
        *need_whole_weights,
    ):
        if sharded and asked:
            raise UserError(f'{flag} needs whole weights on each device and does not go with '
                            f'{accelerator.distributed_type.value}; leave it out, or launch with --multi_gpu')
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise UserError(f'--sync-bn: torch has it on CUDA only, not on {accelerator.device.type}; leave it out')
    return accelerator


def folder_and_checkpoint(accelerator: Accelerator, config: LoopConfig, name: str) -> tuple[Path, Path | None]:
    """The run folder, which is not made yet, and the checkpoint to go on from, the same on every process."""
    def choose() -> tuple[Path, Path | None]:
        folder = run_folder(config, name)
        return folder, choose_checkpoint(config.resume, folder, print) if config.resume else None

    return agree(accelerator, choose)


def assemble(
        config: ConfigT,
        accelerator: Accelerator,
        folder: Path,
        task: TrainingTask,
        data: TrainData,
        **parts: Any,
) -> Run[ConfigT]:
    """Make optimizer, average and schedule, and prepare everything for the processes.

    Args:
        config: The run's config.
        accelerator: Its accelerator.
        folder: Its folder.
        task: Around a model on its device, not prepared yet.
        data: Its loaders, not prepared yet.
        parts: The other fields of `Run`.

    Raises:
        UserError: An optimizer or schedule that cannot be made.
    """
    images = config.batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    optimizer = create_optimizer(config, trainable(task), resolve_lr(config, images))
    if config.model_ema:
        device = torch.device('cpu') if config.model_ema_force_cpu else None
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup, device=device)
    task.trainable_module, optimizer, train_loader, eval_loader = accelerator.prepare(
        task.trainable_module, optimizer, data.train_loader, data.eval_loader)
    updates = -(-len(train_loader) // accelerator.gradient_accumulation_steps)
    scheduler, epochs = create_scheduler(config, optimizer, updates)
    return Run(
        config=config, accelerator=accelerator, folder=folder, task=task, optimizer=optimizer, scheduler=scheduler,
        epochs=epochs, data=data, train_loader=train_loader, eval_loader=eval_loader, **parts)


def begin(run: Run, checkpoint: Path | None) -> None:
    """Tell the plan, create the run folder, seed each process, put a checkpoint back. The loop comes right after it."""
    for line in plan_lines(run):
        run.accelerator.print(line)
    _open_folder(run)
    set_seed(run.config.seed, device_specific=True)
    if checkpoint is not None:
        resume(run, checkpoint)


def _open_folder(run: Run) -> None:
    """Create the run folder, with the config, and start the trackers."""
    def open_folder() -> None:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f'run folder {run.folder}: {e.strerror}; choose another --output') from e
        report.write_text(run.folder / 'args.yaml', to_yaml(run.config))
        print(f'run folder: {run.folder}', flush=True)

    agree(run.accelerator, open_folder)
    if run.config.log_with:
        run.accelerator.project_configuration.project_dir = str(run.folder)
        run.accelerator.project_configuration.logging_dir = str(run.folder)
        scalars = {k: v for k, v in asdict(run.config).items() if isinstance(v, (int, float, str, bool))}
        run.accelerator.init_trackers('timm_spinal', config=scalars)


def resume(run: Run, checkpoint: Path) -> None:
    """Put the state of a checkpoint back. Nothing may draw random numbers between this and the loop.

    Raises:
        UserError: The checkpoint is of another model or other data.
    """
    accelerator, state = run.accelerator, read_state(checkpoint)
    changed = check_same_run(state, run.description, str(checkpoint), run.fixed)
    for name in changed.keys() - SILENT:
        accelerator.print(f'resuming with another {name}: {changed[name]}')
    settings = [dict(group) for group in run.optimizer.param_groups]
    load_checkpoint(accelerator, checkpoint, run.task.get_trainable_module(ema=True))
    load_scheduler_state(run.scheduler, state['scheduler'])
    run.progress = Progress(**state['progress'])
    if changed.keys() & SCHEDULE:
        apply_settings(run.optimizer, settings, run.scheduler, run.progress.epoch, run.progress.updates)
    run.progress.stopped_early &= 0 < run.config.early_stop_patience <= run.progress.stale
    if state['processes'] != accelerator.num_processes:
        # random states cannot be the same
        run.progress.batch = batches_done(
            run.progress.batch, state['processes'], accelerator.num_processes, accelerator.gradient_accumulation_steps)
        accelerator.print(f'resuming with {accelerator.num_processes} processes instead of {state["processes"]}: '
                          'the result will not be bit-identical')
    # rows of epochs that will be done again go
    agree(accelerator, lambda: report.write_table(run.folder / 'summary.csv', run.progress.history))
    accelerator.print(f'resuming from {checkpoint}: epoch {run.progress.epoch + 1}, update {run.progress.updates}')
