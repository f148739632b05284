"""Distillation in a run: its settings are checked first, then the teacher is, and WLD gets its teacher."""
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.utils import unwrap_model

from timm_spinal.errors import UserError

from .checkpoint import read_state
from .config import WLD, DistillOptions, TrainConfig
from .data import Datasets
from .evaluate import evaluate
from .loop import Run, eval_model
from .losses import CAPSULE_LOSSES
from .objective import NEED_LOGITS
from .options import option_names, to_flag
from .progress import batches_done
from .teacher import Teacher, open_teacher
from .teacher_cache import check_cache, open_logits
from .wld import WLDTask, check_options


def check_distillation(config: TrainConfig) -> None:
    """Refuse settings of distillation that cannot work, before anything is read.

    Raises:
        UserError: Names the setting and the way out.
    """
    kind = config.kd_distill_type
    if not config.kd_model_name:
        asked = [to_flag(name) for name in option_names(DistillOptions, requires='kd_model_name')
                 if getattr(config, name) is not None]
        if kind == 'wld' or asked:
            raise UserError(f'{(asked or ["--kd-distill-type wld"])[0]}: there is no teacher; give one with '
                            '--kd-model-name')
        return
    if kind in NEED_LOGITS and config.loss in CAPSULE_LOSSES:
        raise UserError(f'--loss {config.loss}: is one of capsule lengths and has no logits, which --kd-distill-type '
                        f'{kind} needs; use --loss ce with --model-kwargs head_logit_scale=True')
    if kind == 'wld':
        check_options(config.kd_loss_type or 'mse', config.kd_fade, config.kd_fade_end, config.kd_two_stage)
        if config.task_loss_weight is not None:
            raise UserError('--task-loss-weight: wld adds the distillation loss to the whole loss; set its weight with '
                            '--distill-loss-weight')
        if config.kd_cache is not None:
            check_cache(config)
        return
    default = {f.name: f.default for f in fields(DistillOptions)}
    for name in option_names(DistillOptions, requires=WLD):
        if getattr(config, name) != default[name]:
            raise UserError(f'{to_flag(name)}: has no effect on --kd-distill-type {kind}; use wld, or leave it out')
    if config.kd_loss_type == 'mse':
        raise UserError(f'--kd-loss-type mse: is one of wld; use --kd-distill-type wld, or kl for {kind}')
    if kind == 'feature' and config.kd_check is not None:
        raise UserError('--kd-check: features have no accuracy; leave it out')


def prepare_teacher(run: Run, datasets: Datasets, checkpoint: Path | None) -> None:
    """Give WLD the length of the run and its teacher or cached logits; measure the teacher where --kd-check says so.

    When a resumed run is past the fade, the teacher is not even loaded; it is not measured again either.

    Raises:
        UserError: A teacher that is missing, does not fit or is not good enough; a cache that does not fit.
    """
    config, task = run.config, run.task
    if not config.kd_model_name:
        return
    teacher: Any = getattr(task, 'teacher', None)
    if isinstance(task, WLDTask):
        accum, processes = run.accelerator.gradient_accumulation_steps, run.accelerator.num_processes
        task.set_length(run.epochs, len(run.train_loader), accum)
        if checkpoint is not None:
            state = read_state(checkpoint)
            batch = batches_done(state['progress']['batch'], state['processes'], processes, accum)
            task.batches = state['progress']['epoch'] * task.batches_per_epoch + batch
        if not task.distill_weight:
            return
        with run.accelerator.main_process_first():
            teacher = open_teacher(
                config.kd_model_name, _student(run), run.data.data_config, config.kd_renormalize, run.data.class_names)
        teacher.to(run.accelerator.device)
        if config.kd_cache is None:
            task.teacher = teacher
    if config.kd_check is not None and checkpoint is None:
        _check_accuracy(run, teacher)
    if config.kd_cache is not None:
        dataset: Any = run.train_loader.dataset
        dataset.rows = open_logits(run, datasets, teacher)


def _student(run: Run) -> Any:
    return unwrap_model(eval_model(run.task))


def _check_accuracy(run: Run, teacher: Teacher) -> None:
    """Evaluate the teacher on the validation data; nothing that the run draws depends on it."""
    config = run.config
    metrics = evaluate(run.accelerator, teacher, run.eval_loader, config.channels_last, 'teacher')
    top1, chance = metrics['top1'], 100. / run.data.num_classes
    run.accelerator.print(
        f'teacher {config.kd_model_name}: top-1 {top1:.2f} % of {metrics["images"]} validation images')
    run.progress.teacher_top1 = top1
    if top1 < (config.kd_check or 0.) or top1 <= chance:
        limit = f'below the {config.kd_check:g} % of --kd-check' if config.kd_check else 'no better than chance'
        raise UserError(f'teacher {config.kd_model_name}: top-1 {top1:.2f} % on the validation data is {limit}; check '
                        'its classes and input, or choose another teacher')
