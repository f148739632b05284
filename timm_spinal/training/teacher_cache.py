"""Logits of a teacher for every training image, made once and kept on the disk (``--kd-cache``).

They hold while the images that the student sees are the same in every epoch, so with --no-aug and without mixing. All
images of the training split's data set are answered, also those that --val-split-fraction cuts out, so that runs with
different seeds share them.
"""
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.errors import UserError

from .config import BESIDE, TrainConfig
from .data import Datasets
from .dataset import ImageData, Source
from .loop import Run
from .shards import (
    SHARD_SIZE,
    Wording,
    check_space,
    has_shard,
    hash_source,
    hash_weights,
    open_cache,
    shard_count,
    shard_path,
    write_shard,
)
from .sources import STREAMED
from .teacher import Teacher
from .transforms import create_decoder, train_transform

_WORDS = Wording(
    'teacher logits', 'remove the folder, or choose another --kd-cache', 'remove it and run again',
    'choose another --kd-cache, or leave it out')


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
        UserError: Augmentation, mixing or a streamed source.
    """
    if config.dataset.partition('/')[0].lower() in STREAMED:
        raise UserError('--kd-cache: images of a streamed source have no numbers; leave it out')
    if config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None:
        raise UserError('--kd-cache: the teacher must see the mixed images, which are new in every epoch; leave out '
                        '--mixup and --cutmix, or --kd-cache')
    if not config.no_aug:
        raise UserError('--kd-cache: augmented images are new in every epoch; add --no-aug, or leave out --kd-cache')


def open_logits(run: Run, datasets: Datasets, teacher: Teacher) -> TeacherLogits:
    """The logits of the training images; what is not in the cache is made, by all processes.

    Raises:
        UserError: The cache was made with other data, another teacher or transform; no space; an unreadable image.
    """
    config, accelerator = run.config, run.accelerator
    assert datasets.train is not None
    whole = replace(datasets.train, labels=None, indices=None)
    folder = Path(config.kd_cache or '')
    if config.kd_cache == BESIDE:
        folder = run.folder.parent / 'teacher-logits'
    identity = _identity(run, whole, teacher)
    with accelerator.main_process_first():
        mark = open_cache(folder, identity, _WORDS)
    missing = [i for i in range(shard_count(len(whole))) if not has_shard(shard_path(folder, 'train', 0, i), mark)]
    check_space(folder, len(missing) * SHARD_SIZE * 4 * run.data.num_classes, _WORDS)
    accelerator.wait_for_everyone()  # no process may write before all have seen what is missing
    start = time.perf_counter()
    for index in missing[accelerator.process_index::accelerator.num_processes]:
        _make_shard(run, whole, teacher, folder, index, mark)
    accelerator.wait_for_everyone()
    if missing:
        accelerator.print(f'teacher logits: {len(whole)} images in {folder}, {time.perf_counter() - start:.1f} s')
    return TeacherLogits(folder)


def _identity(run: Run, whole: Source, teacher: Teacher) -> dict[str, Any]:
    config, data = run.config, run.data.data_config
    model: Any = teacher.model
    return dict(
        model=str(model.pretrained_cfg.get('architecture', type(model).__name__)),
        weights=hash_weights(model),
        num_classes=run.data.num_classes,
        data=hash_source(whole),
        transform=f'{create_decoder(config, data["input_size"][0])} {train_transform(config, data)}',
        mean=[float(v) for v in data['mean']],
        std=[float(v) for v in data['std']],
        timm=timm.__version__,
        precision=run.accelerator.mixed_precision,
    )


def _make_shard(run: Run, whole: Source, teacher: Teacher, folder: Path, index: int, mark: str) -> None:
    config, accelerator, data = run.config, run.accelerator, run.data.data_config
    first = index * SHARD_SIZE
    numbers = range(first, min(first + SHARD_SIZE, len(whole)))
    dataset = ImageData(
        whole, train_transform(config, data), create_decoder(config, data['input_size'][0]),
        'mark' if config.skip_unreadable else 'raise')
    loader = DataLoader(
        dataset, batch_size=config.validation_batch_size or config.batch_size,
        sampler=[(number, None) for number in numbers], num_workers=config.workers, pin_memory=config.pin_mem,
        collate_fn=dataset.collate, generator=torch.Generator())
    rows = []
    for images, _ in tqdm(loader, desc=f'teacher logits {index}', leave=False,
                          disable=None if accelerator.is_main_process else True):
        images = images.to(accelerator.device)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            rows.append(teacher(images).float().cpu())
    write_shard(shard_path(folder, 'train', 0, index), dict(logits=torch.cat(rows).contiguous()), mark)
