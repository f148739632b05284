"""One training run from a config: data, model, objective, optimizer, Accelerate, loop, report."""
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, set_seed
from timm.layers import convert_sync_batchnorm

from timm_spinal.errors import UserError

from . import report
from .agree import agree
from .checkpoint import choose_checkpoint, load_checkpoint, read_state
from .config import TrainConfig, to_yaml
from .data import Datasets, TrainData, create_data, create_datasets
from .distill import check_distillation, prepare_teacher
from .folder import run_folder
from .freeze import apply_freeze
from .identity import SCHEDULE, SILENT, check_same_run
from .loop import Run, fit, trainable
from .metrics import choosing_metric
from .model import check_batch_of_one, check_model_name, create_model
from .objective import build_penalties, build_task
from .optim import apply_settings, create_optimizer, create_scheduler, load_scheduler_state, resolve_lr
from .outcome import SHARDED, export_best, finish, write_reports
from .progress import Progress, batches_done
from .signs import signs_of


def train(
        config: TrainConfig,
        after_epoch: Callable[[Run], None] | None = None,
        after_run: Callable[[Run, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a model as a config says, and write its run folder.

    Every process of a launch calls it. Random states, thread and process settings stay as the run leaves them.

    Args:
        config: The run's config.
        after_epoch: Called by every process after the reports of each epoch.
        after_run: Called by every process at the end, with the result.

    Returns:
        The content of ``result.json``; see `outcome.summarise`.

    Raises:
        UserError: Anything a user can mend; one line.
        StopRequested: SIGINT or SIGTERM; a checkpoint has been written.
    """
    # the settings of a run before this one in the same process
    AcceleratorState._reset_state()
    accelerator = create_accelerator(config)
    try:
        run = prepare(config, accelerator)
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


def create_accelerator(config: TrainConfig) -> Accelerator:
    """An `Accelerator` in which everything that the config leaves open is up to ``accelerate config`` or ``launch``.

    Raises:
        UserError: Trackers or precision that are not available; options that do not go with sharded weights.
    """
    kwargs: dict[str, Any] = {}
    if config.grad_accum_steps > 1:  # the plugin wins over the environment, the plain argument does not
        kwargs['gradient_accumulation_plugin'] = GradientAccumulationPlugin(num_steps=config.grad_accum_steps)
    if config.torchcompile:
        kwargs['dynamo_plugin'] = TorchDynamoPlugin(backend=config.torchcompile, mode=config.torchcompile_mode)
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
        (bool(config.kd_model_name) and config.kd_distill_type == 'feature', '--kd-distill-type feature'),
        (bool(config.sb_ortho), '--sb-ortho'),
    ):
        if sharded and asked:
            raise UserError(f'{flag} needs whole weights on each device and does not go with '
                            f'{accelerator.distributed_type.value}; leave it out, or launch with --multi_gpu')
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise UserError(f'--sync-bn: torch has it on CUDA only, not on {accelerator.device.type}; leave it out')
    return accelerator


def prepare(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Make everything that the loop needs, put a checkpoint back when resuming, and create the run folder."""
    check_model_name(config.model)
    check_distillation(config)
    with accelerator.main_process_first():
        datasets = create_datasets(config)
    config = replace(config, num_classes=datasets.num_classes)
    metric = choosing_metric(config.eval_metric, datasets.multi_label)
    set_seed(config.seed)
    with accelerator.main_process_first():
        model = create_model(config, datasets.num_classes)
    signs = signs_of(model)
    data = create_data(config, model, datasets, num_processes=accelerator.num_processes)
    kept_in_eval = apply_freeze(model, config.freeze, config.freeze_modules)
    if config.batch_size == 1:
        check_batch_of_one(model, data.data_config['input_size'], kept_in_eval)
    folder, checkpoint = agree(accelerator, lambda: _folder_and_checkpoint(config, data))

    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    model.to(accelerator.device)
    with accelerator.main_process_first():  # a teacher may be downloaded
        task = build_task(
            config, model, data.mixup is not None, accelerator.device, data.data_config, data.class_names,
            data.multi_label)
    penalties = build_penalties(config, model)
    images = config.batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    optimizer = create_optimizer(config, trainable(task), resolve_lr(config, images))
    if config.model_ema:
        device = torch.device('cpu') if config.model_ema_force_cpu else None
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup, device=device)
    task.trainable_module, optimizer, train_loader, eval_loader = accelerator.prepare(
        task.trainable_module, optimizer, data.train_loader, data.eval_loader)
    updates = -(-len(train_loader) // accelerator.gradient_accumulation_steps)
    scheduler, epochs = create_scheduler(config, optimizer, updates)
    run = Run(
        config, metric, accelerator, folder, task, optimizer, scheduler, epochs, data, train_loader, eval_loader,
        penalties, kept_in_eval, signs, describe(config, datasets, data), export_best, write_reports)
    prepare_teacher(run, datasets, checkpoint)
    _open_folder(run)
    set_seed(config.seed, device_specific=True)
    if checkpoint is not None:
        resume(run, checkpoint)
    return run


def _folder_and_checkpoint(config: TrainConfig, data: TrainData) -> tuple[Path, Path | None]:
    folder = run_folder(config, data.data_config['input_size'])
    return folder, choose_checkpoint(config.resume, folder, print) if config.resume else None


def describe(config: TrainConfig, datasets: Datasets, data: TrainData) -> dict[str, Any]:
    """What a checkpoint remembers of config and data, to refuse a resumption with others."""
    names = hashlib.sha256(repr(data.class_names).encode()).hexdigest()[:12]
    found = dict(train_size=data.train_size, eval_size=data.eval_size, num_classes=data.num_classes, class_names=names)
    return dict(config=asdict(config), data=found)


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
    changed = check_same_run(state, run.description, str(checkpoint))
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
