"""Distillation in a run: its settings are checked, the teacher is made ready, and its logits may be kept on the disk.

Logits of a teacher for every training image (``--kd-cache``) hold while the images that the student sees are the same
in every epoch, so with --no-aug and without mixing. All images of the training split's data set are answered, also
those that --val-split-fraction cuts out, so that runs with different seeds share them.
"""
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from safetensors import safe_open
from timm.utils import unwrap_model
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.errors import UserError
from timm_spinal.evaluation.evaluate import evaluate
from timm_spinal.shards import (
    SHARD_SIZE,
    Wording,
    check_space,
    has_shard,
    hash_weights,
    open_cache,
    shard_count,
    shard_path,
    write_shard,
)

from .config import BESIDE, WLD, DistillOptions, TrainConfig
from .data import TrainData
from .dataset import ImageData, Split
from .image_folder import hash_split
from .options import option_names, to_flag
from .splits import STREAMED
from .task import CAPSULE_LOSSES, NEED_LOGITS, Task
from .teacher import Teacher, open_teacher
from .transforms import create_decoder, train_transform
from .wld import WLDTask, check_options

_WORDS = Wording(
    'teacher logits', 'remove the folder, or choose another --kd-cache', 'remove it and run again',
    'choose another --kd-cache, or leave it out')


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
        raise UserError(f'--loss {config.loss}: works on the lengths of capsules, but --kd-distill-type {kind} needs '
                        f'logits; use --loss ce with --model-kwargs head_logit_scale=True')
    if kind == 'wld':
        check_options(config.kd_loss_type or 'mse', config.kd_fade, config.kd_fade_end, config.kd_two_stage)
        if config.task_loss_weight is not None:
            raise UserError('--task-loss-weight: has no effect on wld, where the weight of the classification loss is '
                            '1; set its weight with --distill-loss-weight')
        if config.kd_cache is not None:
            check_cache(config)
        return
    default = {f.name: f.default for f in fields(DistillOptions)}
    for name in option_names(DistillOptions, requires=WLD):
        if getattr(config, name) != default[name]:
            raise UserError(f'{to_flag(name)}: has no effect on --kd-distill-type {kind}; use wld, or leave it out')
    if config.kd_loss_type == 'mse':
        raise UserError('--kd-loss-type mse: only wld has it; use --kd-distill-type wld, or --kd-loss-type kl for '
                        f'{kind}')
    if kind == 'feature' and config.kd_check is not None:
        raise UserError('--kd-check: feature distillation uses no logits of the teacher whose accuracy could be '
                        'checked; leave it out')


def prepare_teacher(
        config: TrainConfig,
        accelerator: Accelerator,
        task: Task,
        data: TrainData,
        eval_loader: DataLoader,
        folder: Path,
        resuming: bool,
) -> float | None:
    """Give WLD its teacher, or its teacher's logits from the disk; measure a teacher where --kd-check says so.

    When a resumed run is past the fade, the teacher is not even loaded; it is not measured again either.

    Args:
        config: The run's config.
        accelerator: Of the run.
        task: Prepared, and told by `Task.set_length` and `Task.start_epoch` how long the run is and where it stands.
        data: Of the run; the training data set gets the logits.
        eval_loader: Of the validation data, prepared.
        folder: Of the run.
        resuming: The run goes on from a checkpoint.

    Returns:
        Top-1 of the teacher in percent where it was measured, else None.

    Raises:
        UserError: A teacher that is missing, does not fit or is not good enough; a cache that does not fit.
    """
    if not config.kd_model_name:
        return None
    teacher: Any = getattr(task, 'teacher', None)
    if isinstance(task, WLDTask):
        if not task.distill_weight:
            return None
        with accelerator.main_process_first():
            teacher = open_teacher(
                config.kd_model_name, unwrap_model(task.trainable_module), data.data_config, config.kd_renormalize,
                data.class_names)
        teacher.to(accelerator.device)
        if config.kd_cache is None:
            task.teacher = teacher.compile_for(config)
    top1 = None
    if config.kd_check is not None and not resuming:
        top1 = _check_accuracy(config, accelerator, teacher, eval_loader, data.num_classes)
    if config.kd_cache is not None:
        dataset: Any = data.train_loader.dataset
        dataset.rows = open_logits(config, accelerator, data, teacher, folder)
    return top1


def _check_accuracy(
        config: TrainConfig,
        accelerator: Accelerator,
        teacher: Teacher,
        loader: DataLoader,
        num_classes: int,
) -> float:
    """Top-1 of the teacher on the validation data; nothing that the run draws depends on it."""
    metrics = evaluate(accelerator, teacher, loader, config.channels_last, 'teacher')
    top1, chance = metrics['top1'], 100. / num_classes
    accelerator.print(f'teacher {config.kd_model_name}: top-1 {top1:.2f} % of {metrics["images"]} validation images')
    if top1 < (config.kd_check or 0.) or top1 <= chance:
        limit = f'below the {config.kd_check:g} % of --kd-check' if config.kd_check else 'no better than chance'
        raise UserError(f'teacher {config.kd_model_name}: top-1 {top1:.2f} % on the validation data is {limit}; check '
                        'its classes and input, or choose another teacher')
    return top1


# ---- logits on the disk ---------------------------------------------------------------------------------------------


class TeacherLogits:
    """``logits[i]`` is the row (K,) of image i. Shards are mapped, not read, so all workers share one copy."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[int, Any] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, row = divmod(index, SHARD_SIZE)
        if shard not in self._open:
            file = safe_open(shard_path(self.folder, 'train', 0, shard), framework='pt')
            self._open[shard] = file.get_slice('logits')
        return self._open[shard][row]

    def __getstate__(self) -> dict[str, Any]:
        return dict(folder=self.folder, _open={})  # a process that gets a copy maps the shards itself


def check_cache(config: TrainConfig) -> None:
    """Refuse a cache where the images change from epoch to epoch.

    Raises:
        UserError: Augmentation, mixing or a streamed data set.
    """
    if config.dataset.partition('/')[0].lower() in STREAMED:
        raise UserError('--kd-cache: the images of a streamed source have no index to store logits by; leave it out')
    if config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None:
        raise UserError('--kd-cache: mixed images differ in every epoch, so their logits cannot be stored; leave out '
                        '--mixup and --cutmix, or --kd-cache')
    if not config.no_aug:
        raise UserError('--kd-cache: augmented images differ in every epoch, so their logits cannot be stored; add '
                        '--no-aug, or leave out --kd-cache')


def open_logits(
        config: TrainConfig,
        accelerator: Accelerator,
        data: TrainData,
        teacher: Teacher,
        folder: Path,
) -> TeacherLogits:
    """The logits of the training images; those that are not in the cache are made, by all processes.

    Args:
        config: The run's config.
        accelerator: Of the run.
        data: Of the run.
        teacher: On its device.
        folder: Of the run.

    Raises:
        UserError: The cache was made with other data, another teacher or transform; no space; an unreadable image.
    """
    dataset: Any = data.train_loader.dataset
    whole = replace(dataset.split, labels=None, indices=None)
    cache = Path(config.kd_cache or '')
    if config.kd_cache == BESIDE:
        cache = folder.parent / 'teacher-logits'
    with accelerator.main_process_first():
        mark = open_cache(cache, _identity(config, accelerator, data, whole, teacher), _WORDS)
    missing = [i for i in range(shard_count(len(whole))) if not has_shard(shard_path(cache, 'train', 0, i), mark)]
    check_space(cache, len(missing) * SHARD_SIZE * 4 * data.num_classes, _WORDS)
    accelerator.wait_for_everyone()  # no process may write before all have seen what is missing
    start = time.perf_counter()
    for index in missing[accelerator.process_index::accelerator.num_processes]:
        loader = _shard_loader(config, data, whole, index)
        bar = tqdm(loader, desc=f'teacher logits {index}', leave=False,
                   disable=None if accelerator.is_main_process else True)
        logits = [_answer(config, accelerator, teacher, images) for images, _ in bar]
        write_shard(shard_path(cache, 'train', 0, index), dict(logits=torch.cat(logits).contiguous()), mark)
    accelerator.wait_for_everyone()
    if missing:
        accelerator.print(f'teacher logits: {len(whole)} images in {cache}, {time.perf_counter() - start:.1f} s')
    return TeacherLogits(cache)


def _identity(
        config: TrainConfig,
        accelerator: Accelerator,
        data: TrainData,
        whole: Split,
        teacher: Teacher,
) -> dict[str, Any]:
    """What the logits depend on."""
    model: Any = teacher.model
    return dict(
        model=str(model.pretrained_cfg.get('architecture', type(model).__name__)),
        weights=hash_weights(model),
        num_classes=data.num_classes,
        data=hash_split(whole),
        transform=f'{create_decoder(config, data.data_config["input_size"][0])} '
                  f'{train_transform(config, data.data_config)}',
        mean=[float(v) for v in data.data_config['mean']],
        std=[float(v) for v in data.data_config['std']],
        timm=timm.__version__,
        precision=accelerator.mixed_precision,
    )


def _shard_loader(config: TrainConfig, data: TrainData, whole: Split, index: int) -> DataLoader:
    """The images of a shard in order, as the student sees them."""
    first = index * SHARD_SIZE
    dataset = ImageData(
        whole, train_transform(config, data.data_config), create_decoder(config, data.data_config['input_size'][0]),
        'mark' if config.skip_unreadable else 'raise')
    return DataLoader(
        dataset,
        batch_size=config.validation_batch_size or config.batch_size,
        sampler=[(number, None) for number in range(first, min(first + SHARD_SIZE, len(whole)))],
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        collate_fn=dataset.collate,
        generator=torch.Generator(),
    )


def _answer(config: TrainConfig, accelerator: Accelerator, teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
    """Logits of a batch, on the CPU."""
    images = images.to(accelerator.device)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        return teacher(images).float().cpu()
