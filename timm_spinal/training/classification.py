"""Training of image classifiers: their data, model, task and metrics."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.models import safe_model_name
from timm.utils import unwrap_model
from torch.utils.data import DataLoader

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.evaluation.evaluate import evaluate
from timm_spinal.evaluation.judgement import draw_mistakes, named_classes
from timm_spinal.evaluation.metrics import accuracies, choosing_metric
from timm_spinal.evaluation.predictions import Predictions, read_predictions
from timm_spinal.layers import xnor_implementation

from .batches import Finished
from .config import TrainConfig
from .data import create_data
from .distill import check_distillation, prepare_teacher
from .distributed import on_main_process, used_precision
from .model import (
    binary_signs,
    binary_weight_flips,
    check_batch_of_one,
    check_model_name,
    count_statistics_once,
    create_model,
    fit_momentum,
    needs_registration,
)
from .optim import apply_freeze, head_first
from .report import how_to_load
from .results import common_result, environment, export_model
from .run import Problem, Run
from .run_dir import begun_on_device
from .sharded import is_sharded
from .splits import create_datasets, describe_splits
from .task import Task, build_penalties, build_task


class Classification(Problem[TrainConfig]):
    """Images and their classes: one of an image, or, in multimnist, two.

    Raises:
        UserError: Data that cannot be used, and options that exclude each other or the data.
    """
    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        check_model_name(config.model)
        check_distillation(config)
        check_warm_start(config)
        with accelerator.main_process_first():
            self.datasets = create_datasets(config)
        accelerator.print(describe_splits(self.datasets.named(config)), flush=True)
        self.multi_label = self.datasets.multi_label
        self.config = replace(
            config, num_classes=self.datasets.num_classes, mixed_precision=used_precision(config, accelerator))
        self.metrics = ('loss', *accuracies(self.multi_label))
        self.metric = choosing_metric(config.eval_metric, self.multi_label)

    @staticmethod
    def need_whole_weights(config: TrainConfig) -> list[tuple[bool, str]]:
        return [
            (bool(config.kd_model_name) and config.kd_distill_type == 'feature', '--kd-distill-type feature'),
            (bool(config.sb_ortho), '--sb-ortho'),
            (bool(config.freeze_epochs), '--freeze-epochs'),
        ]

    def build_model(self, config: TrainConfig) -> Any:
        return create_model(config, self.datasets.num_classes)

    def without_weights(self) -> dict[str, Any]:
        return dict(pretrained=False, pretrained_path=None, initial_checkpoint='')

    def create_data(self, model: Any, accelerator: Accelerator) -> None:
        self.data = create_data(
            self.config, model, self.datasets, num_processes=accelerator.num_processes,
            accum=accelerator.gradient_accumulation_steps, on_device=accelerator.device.type != 'cpu',
            accelerator=accelerator,
            begun_on_device=on_main_process(accelerator, lambda: begun_on_device(self.config)))
        size = self.data.data_config['input_size'][-1]
        self.name = f'{safe_model_name(self.config.model)}-{size}'
        self.first_signs = binary_signs(model)

    def create_task(self, model: Any, accelerator: Accelerator, resuming: bool) -> Task:
        config, data = self.config, self.data
        kept_in_eval = apply_freeze(model, config.freeze, config.freeze_modules)
        if config.batch_size == 1 and not (config.sync_bn and accelerator.num_processes > 1):
            check_batch_of_one(model, data.data_config['input_size'], kept_in_eval)
        if config.grad_checkpointing:
            count_statistics_once(model)
        if config.ic_warm_start is not None and not resuming:
            self._warm_start(model, accelerator)
        with accelerator.main_process_first():  # a teacher may be downloaded
            task = build_task(
                config, model, data.mixup is not None, accelerator.device, data.data_config, data.class_names,
                self.multi_label)
        task.penalties = build_penalties(config, model)
        task.frozen = head_first(model, config.freeze_epochs, kept_in_eval)
        return task

    def _warm_start(self, model: nn.Module, accelerator: Accelerator) -> None:
        """Choose w' and re-estimate BatchNorm statistics on training images, augmented but not mixed.

        Every process looks at the same batches.

        Raises:
            UserError: A model without collisions, or with BatchNorm in them.
        """
        assert self.config.ic_warm_start is not None
        self.data.set_epoch(0)
        loader, finish = self.data.train_loader, self.data.finish
        batches = loader if finish is None else Finished(loader, finish)
        try:
            shares = timm_spinal.ic_warm_start(model, batches, self.config.ic_warm_start)
        except ValueError as e:
            raise UserError(f'--ic-warm-start: {e}') from e
        accelerator.print(f'warm start: {len(shares)} collisions, active at {100 * min(shares.values()):.1f} to '
                          f'{100 * max(shares.values()):.1f} % of their positions')

    def before_training(self, run: Run[TrainConfig], resuming: bool) -> None:
        config = self.config
        if config.bn_momentum is None:
            updates = run.updates_per_epoch * run.epochs
            for line in fit_momentum(run.task.evaluated(), updates, config.model_kwargs, run.task.frozen.kept_in_eval):
                run.accelerator.print(line)
        top1 = prepare_teacher(
            config, run.accelerator, run.task, self.data, run.eval_loader, run.folder, resuming)
        if top1 is not None:
            run.progress.teacher_top1 = top1

    def evaluate(self, run: Run[TrainConfig], model: nn.Module, loader: DataLoader, split: str) -> dict[str, Any]:
        """Loss in nats and accuracies in percent, and ``predictions``, which for a test split are written."""
        kept = None if self.multi_label else self._new_predictions(split)
        metrics = evaluate(
            run.accelerator, model, loader, self.config.channels_last, split, self.multi_label,
            kept.add if kept else None)
        if kept is not None and split == 'test':
            on_main_process(run.accelerator, lambda: kept.write(run.folder))
        return dict(metrics, predictions=kept)

    def _new_predictions(self, split: str) -> Predictions:
        images = self.datasets.test if split == 'test' else self.datasets.eval
        file_of = None if images is None or images.streamed else images.file_name
        return Predictions('test' if split == 'test' else 'validation', file_of)

    def save_best(
            self,
            folder: Path,
            model: Any,
            state_dict: dict[str, torch.Tensor],
            metrics: dict[str, Any],
    ) -> None:
        export_model(folder, model, state_dict, self.data.class_names, self.data.data_config)
        if metrics['predictions'] is not None:
            metrics['predictions'].write(folder)

    def write_pictures(self, run: Run[TrainConfig]) -> list[Path]:
        """``confusion.png`` and ``worst.png`` of the weights that are kept, on the test split if there is one."""
        kept = read_predictions(run.folder) or read_predictions(run.folder, 'validation')
        if kept is None:
            return []
        images = (self.data.test_loader or self.data.eval_loader).dataset
        names = named_classes(self.data.class_names, self.data.num_classes)
        return draw_mistakes(run.folder, kept, names, getattr(images, 'picture', None))

    def result(self, run: Run[TrainConfig]) -> dict[str, Any]:
        """``result.json``: accuracies in percent and losses in nats of the best epoch, counts, speed, origin.

        The accuracies are ``top1`` and ``top5``, or those of `metrics.PairEvaluator` where images have two classes.
        ``epochs`` is the number of epochs done, ``best_epoch`` counts from 0 as summary.csv does; ``seconds`` and
        ``images_per_second`` are of training and evaluation, and of training alone. ``same_answer`` holds the classes
        of the only answer that the model has for all evaluation images; None, as it should be, where it has several.
        ``teacher_top1`` is what --kd-check found. ``weights`` says what became of the weights that the model started
        from (source, tensors loaded, names left out and new), None without any. ``sign_flips`` is the part of the
        binary weights (XnODR), in percent, whose sign is another after the last update than before the first; None
        without any. ``xnor``, for models with xnorized layers only, says what computed them; see
        `layers.xnor_implementation`.
        """
        config, model, teacher = self.config, unwrap_model(run.task.evaluated()), {}
        if config.kd_model_name:
            teacher = dict(teacher=config.kd_model_name, teacher_top1=run.progress.teacher_top1)
        return dict(
            model=config.model,
            **common_result(run),
            **teacher,
            **xnor_implementation(model),
            sign_flips=None if is_sharded(run.accelerator) else binary_weight_flips(self.first_signs, model),
            dataset=config.dataset or config.data_dir,
            **environment(run),
        )

    def how_to_load(self, run: Run[TrainConfig]) -> str:
        name = unwrap_model(run.task.evaluated()).pretrained_cfg['architecture']
        return how_to_load(run.folder, name if needs_registration(name) else '')


def check_warm_start(config: TrainConfig) -> None:
    """Refuse ``--ic-warm-start``, a start of an IC model nearly as the plain model of its weights, without weights.

    Raises:
        UserError: Names the way out.
    """
    if config.ic_warm_start is not None and not (config.pretrained or config.pretrained_path):
        raise UserError('--ic-warm-start: the model starts without the weights of a plain model; add '
                        '--pretrained, or --pretrained-path with the model.safetensors of a plain model')
