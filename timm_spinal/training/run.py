"""One training run from a config: data, model, objective, optimizer, Accelerate, loop, report."""
import hashlib
from dataclasses import asdict, replace
from typing import Any, Callable

import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, set_seed
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from torch.utils.data import DataLoader

from timm_spinal.evaluation.evaluate import evaluate
from timm_spinal.evaluation.metrics import accuracies, choosing_metric
from timm_spinal.evaluation.predictions import Predictions

from .agree import agree
from .checkpoint import read_state
from .config import TrainConfig
from .data import TrainData, create_data
from .distill import check_distillation, prepare_teacher
from .freeze import apply_freeze, head_first
from .loop import Run
from .model import check_batch_of_one, check_model_name, count_statistics_once, create_model
from .outcome import export_best, finish, write_reports
from .plan import fit_momentum, updates_per_epoch
from .progress import batches_done
from .signs import signs_of
from .splits import Datasets, create_datasets, describe_splits
from .start import (
    assemble,
    begin,
    carry_out,
    create_with_weights,
    folder_and_checkpoint,
    make_accelerator,
    used_precision,
)
from .task import build_penalties, build_task
from .warm_start import check_warm_start, warm_start


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
    accelerator = create_accelerator(config)
    return carry_out(accelerator, lambda: prepare(config, accelerator), finish, after_epoch, after_run)


def create_accelerator(config: TrainConfig) -> Accelerator:
    """An `Accelerator` in which everything that the config leaves open is up to ``accelerate config`` or ``launch``.

    Raises:
        UserError: Trackers or precision that are not available; options that do not go with sharded weights.
    """
    kwargs: dict[str, Any] = {}
    if config.torchcompile:
        kwargs['dynamo_plugin'] = TorchDynamoPlugin(backend=config.torchcompile, mode=config.torchcompile_mode)
    return make_accelerator(config, [
        (bool(config.kd_model_name) and config.kd_distill_type == 'feature', '--kd-distill-type feature'),
        (bool(config.sb_ortho), '--sb-ortho'),
        (bool(config.freeze_epochs), '--freeze-epochs'),
    ], **kwargs)


def prepare(config: TrainConfig, accelerator: Accelerator) -> Run[TrainConfig]:
    """Make everything that the loop needs, put a checkpoint back when resuming, and write the first files."""
    check_model_name(config.model)
    check_distillation(config)
    check_warm_start(config)
    with accelerator.main_process_first():
        datasets = create_datasets(config)
    accelerator.print(describe_splits(datasets.named(config)), flush=True)
    config = replace(
        config, num_classes=datasets.num_classes, mixed_precision=used_precision(config, accelerator))
    metric = choosing_metric(config.eval_metric, datasets.multi_label)
    set_seed(config.seed)
    with accelerator.main_process_first():
        model = create_with_weights(
            lambda config: create_model(config, datasets.num_classes), config, accelerator,
            pretrained=False, pretrained_path=None, initial_checkpoint='')
    signs = signs_of(model)
    data = create_data(
        config, model, datasets, num_processes=accelerator.num_processes,
        accum=accelerator.gradient_accumulation_steps)
    kept_in_eval = apply_freeze(model, config.freeze, config.freeze_modules)
    if config.batch_size == 1:
        check_batch_of_one(model, data.data_config['input_size'], kept_in_eval)
    name = f'{safe_model_name(config.model)}-{data.data_config["input_size"][-1]}'
    description = describe(config, datasets, data)
    folder, checkpoint = folder_and_checkpoint(accelerator, config, name, description)

    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    if config.grad_checkpointing:
        count_statistics_once(model)
    model.to(accelerator.device)
    if config.ic_warm_start is not None and checkpoint is None:
        warm_start(config, model, data, accelerator)
    with accelerator.main_process_first():  # a teacher may be downloaded
        task = build_task(
            config, model, data.mixup is not None, accelerator.device, data.data_config, data.class_names,
            data.multi_label)
    penalties = build_penalties(config, model)

    def measure(model: nn.Module, loader: DataLoader, name: str) -> dict[str, Any]:
        kept = Predictions() if name == 'test' and not datasets.multi_label else None
        found = evaluate(
            accelerator, model, loader, config.channels_last, name, datasets.multi_label, kept.add if kept else None)
        if kept is not None:
            agree(accelerator, lambda: kept.write(folder))
        return found

    run = assemble(
        config, accelerator, folder, task, data, metric=metric,
        measured=('loss', *accuracies(datasets.multi_label)), measure=measure, penalties=penalties,
        kept_in_eval=kept_in_eval, signs=signs, weights=model.loaded_weights, description=description,
        on_best=export_best, on_epoch=write_reports)
    run.head_first = head_first(model, config.freeze_epochs)  # the optimizer has decided by now what trains at all
    if config.bn_momentum is None:
        updates = updates_per_epoch(run) * run.epochs
        for line in fit_momentum(model, updates, config.model_kwargs, kept_in_eval):
            accelerator.print(line)
    accum = accelerator.gradient_accumulation_steps
    task.set_length(run.epochs, len(run.train_loader), accum)
    if checkpoint is not None:
        state = read_state(checkpoint)
        batch = batches_done(state['progress']['batch'], state['processes'], accelerator.num_processes, accum)
        task.start_epoch(state['progress']['epoch'], batch, len(run.train_loader))
    run.progress.teacher_top1 = prepare_teacher(
        config, accelerator, task, data, run.eval_loader, folder, resuming=checkpoint is not None)
    begin(run, checkpoint)
    return run


def describe(config: TrainConfig, datasets: Datasets, data: TrainData) -> dict[str, Any]:
    """What a checkpoint remembers of config and data, to refuse a resumption with others."""
    names = hashlib.sha256(repr(data.class_names).encode()).hexdigest()[:12]
    found = dict(train_size=data.train_size, eval_size=data.eval_size, num_classes=data.num_classes, class_names=names)
    return dict(config=asdict(config), data=found)
