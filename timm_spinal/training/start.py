"""From the parts of a run to its first update: what every kind of training has in common; see `run.py` for one."""
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from timm.task import TrainingTask

from timm_spinal.errors import UserError, dead_workers_named

from . import report
from .agree import agree, new_accelerator
from .checkpoint import candidates, choose_checkpoint, find_checkpoints, load_checkpoint, read_state
from .config import LoopConfig, to_yaml
from .data import TrainData
from .folder import FolderLock, Occupied, check_free, run_folder
from .loop import ConfigT, Run, fit, trainable
from .optim import apply_settings, create_optimizer, create_scheduler, load_scheduler_state, resolve_lr
from .options import option_names
from .outcome import SHARDED
from .plan import plan_lines
from .progress import Progress, batches_done
from .resume_checks import OF_OPTIMIZER, changed_settings, check_same_run
from .transforms import preserved_rng

Refused = list[tuple[bool, str]]  # whether an option was asked for, and its flag
_claimed = ExitStack()  # lets go of the folder of the run, of which a process has one at a time


def carry_out(
        accelerator: Accelerator,
        prepare: Callable[[], Run],
        finish: Callable[[Run], dict[str, Any]],
        after_epoch: Callable[[Run], None] | None = None,
        after_run: Callable[[Run, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Prepare a run, train it and finish it; returns its result.

    Trackers, memory and the run folder are released whatever happens.

    Raises:
        UserError: A loader worker was killed, and what the parts raise.
    """
    run: Run | None = None
    with _claimed:
        try:
            with dead_workers_named(lambda: _how_to_go_on(run)):
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


def _how_to_go_on(run: Run | None) -> str:
    if run is None:
        return 'run it again'
    return f'go on with --resume auto --experiment {run.folder.name}'


def make_accelerator(config: LoopConfig, need_whole_weights: Refused, **kwargs: Any) -> Accelerator:
    """An `Accelerator` in which everything that the config leaves open is up to ``accelerate config`` or ``launch``.

    Args:
        config: The run's config.
        need_whole_weights: Further options that do not go with sharded weights.
        kwargs: Further arguments of `Accelerator`.

    Raises:
        UserError: Trackers or precision that are not available; options that do not go with sharded weights.
    """
    if config.grad_accum_steps > 1:  # the plugin wins over the environment, the plain argument does not
        kwargs['gradient_accumulation_plugin'] = GradientAccumulationPlugin(num_steps=config.grad_accum_steps)
    # the folder of the trackers is not known yet, and nothing is written before it is
    accelerator = new_accelerator(
        config.mixed_precision, log_with=config.log_with or None, project_dir='.', **kwargs)
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


def folder_and_checkpoint(
        accelerator: Accelerator,
        config: LoopConfig,
        name: str,
        description: dict[str, Any],
) -> tuple[Path, Path | None]:
    """The run folder, held until the run ends, and the checkpoint to go on from, the same on every process.

    Args:
        accelerator: Of the run.
        config: Its config.
        name: What a run without ``experiment`` is called, after the time.
        description: Config and data, as checkpoints hold them.

    Raises:
        UserError: A name that is none, a folder in which another run is going on or was, a checkpoint that is missing,
            damaged or of another run. Nothing is written.
    """
    def choose() -> tuple[Path, Path | None]:
        if config.resume and config.resume != 'auto':
            candidates(config.resume)
        folder = _claim(config, name)
        checkpoint = choose_checkpoint(config.resume, folder, print) if config.resume else None
        if checkpoint is not None:
            check_same_run(read_state(checkpoint), description, str(checkpoint), type(config))
        return folder, checkpoint

    return agree(accelerator, choose)


def create_with_weights(
        create: Callable[[ConfigT], Any],
        config: ConfigT,
        accelerator: Accelerator,
        **without: Any,
) -> Any:
    """The model of a run, with the weights that it starts from; the main process says what became of them.

    A run that goes on from a checkpoint has all weights in it: it does not end for a file that has gone since, or that
    an older version took although it does not fit.

    Args:
        create: Makes the model of a config, with an attribute ``loaded_weights``.
        config: The run's config.
        accelerator: Its accelerator.
        without: Options that make the same model without weights.

    Raises:
        UserError: The model cannot be made.
    """
    try:
        model = create(config)
    except UserError as e:
        checkpoints = find_checkpoints(run_folder(config, '') / 'last') if config.resume else []
        if not checkpoints or _changed(config, checkpoints[0]).keys() & without.keys():
            raise
        model = create(replace(config, **without))
        accelerator.print(f'resuming: the weights of the start are not looked at again ({e})')
    if model.loaded_weights is not None:
        accelerator.print(f'weights {model.loaded_weights}', flush=True)
    return model


def _changed(config: LoopConfig, checkpoint: Path) -> dict[str, str]:
    saved = read_state(checkpoint)
    return changed_settings(saved['config'], vars(config), saved.get('cwd', ''), type(config))


def _claim(config: LoopConfig, name: str) -> Path:
    """The run folder, made and held until the run ends; see `carry_out`."""
    while True:
        folder = run_folder(config, name)
        lock = FolderLock(folder)
        try:
            lock.acquire()
            check_free(config, folder)
        except Occupied:
            lock.release()
            if config.experiment or config.resume:
                raise
            continue  # another run took this name a moment before
        except UserError:
            lock.release()
            raise
        _claimed.callback(lock.release)
        return folder


def used_precision(config: LoopConfig, accelerator: Accelerator) -> str | None:
    """``mixed_precision`` of a config, or what accelerate is configured to where that is not its own default."""
    used = accelerator.mixed_precision
    return config.mixed_precision or (used if used != 'no' else None)


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
    """Tell the plan, seed each process, put a checkpoint back, write the first files. The loop comes right after it.

    Nothing is written before the checkpoint has been found to be of this run.
    """
    for line in plan_lines(run):
        run.accelerator.print(line)
    set_seed(run.config.seed, device_specific=True)
    if checkpoint is not None:
        resume(run, checkpoint)
    with preserved_rng():
        _write_first_files(run)


def _write_first_files(run: Run) -> None:
    """Write the config and start the trackers; rows of epochs that will be done again go."""
    def write() -> None:
        report.write_text(run.folder / 'args.yaml', to_yaml(run.config))
        if run.progress.updates:
            report.write_table(run.folder / 'summary.csv', run.progress.history)
        print(f'run folder: {run.folder}', flush=True)

    agree(run.accelerator, write)
    if run.config.log_with:
        run.accelerator.project_configuration.project_dir = str(run.folder)
        run.accelerator.project_configuration.logging_dir = str(run.folder)
        scalars = {k: v for k, v in asdict(run.config).items() if isinstance(v, (int, float, str, bool))}
        run.accelerator.init_trackers('timm_spinal', config=scalars)


def resume(run: Run, checkpoint: Path) -> None:
    """Put the state of a checkpoint back. Nothing may draw random numbers between this and the loop.

    Raises:
        UserError: The checkpoint does not fit the model or the optimizer, or is of another version.
    """
    accelerator, state = run.accelerator, read_state(checkpoint)
    changed = changed_settings(state['config'], run.description['config'], cls=type(run.config))
    silent = option_names(type(run.config), on_resume='silent')
    for name in [name for name in changed if name not in silent]:
        accelerator.print(f'resuming with another {name}: {changed[name]}')
    settings = [dict(group) for group in run.optimizer.param_groups]
    missing = load_checkpoint(accelerator, checkpoint, run.task.get_trainable_module(ema=True))
    try:
        load_scheduler_state(run.scheduler, state['scheduler'])
        run.progress = Progress(**state['progress'])
    except (KeyError, TypeError) as e:
        raise UserError(f'cannot resume {checkpoint}: it was written by another version of timm_spinal ({e}); use that '
                        'one, or start a new run from its weights with --initial-checkpoint') from e
    if changed.keys() & OF_OPTIMIZER:
        apply_settings(run.optimizer, settings, run.scheduler, run.progress.epoch, run.progress.updates)
    run.progress.stopped_early &= 0 < run.config.early_stop_patience <= run.progress.stale
    if state['processes'] != accelerator.num_processes:
        # random states cannot be the same
        run.progress.batch = batches_done(
            run.progress.batch, state['processes'], accelerator.num_processes, accelerator.gradient_accumulation_steps)
        accelerator.print(f'resuming with {accelerator.num_processes} processes instead of {state["processes"]}: '
                          'the result will not be bit-identical')
    elif unread := [reason for reason in gather_object([missing]) if reason]:
        accelerator.print(f'warning: random states of {checkpoint} cannot be read ({unread[0]}): the run goes on with '
                          'others, and the result will not be bit-identical')
    accelerator.print(f'resuming from {checkpoint}: epoch {run.progress.epoch}, update {run.progress.updates}')
