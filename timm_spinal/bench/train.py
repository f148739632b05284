"""Speed of this package's training loop against timm's own, in turns in one run.

    timm-spinal bench train                                             # resnet18 at 224 px, vgg5_pspinal at 28 px
    timm-spinal bench train --model convnext_atto --img-size 96 --batch-size 32

timm's side is what its ``train.py`` does on one device: `create_loader` with its defaults (prefetcher on), the task's
forward, ``loss.item()``, backward, optimizer, schedule per update. Ours is `training.train.train_epoch`. Same model,
JPEG folder, batch, workers, augmentation and optimizer; one call is one epoch. Printed is the median of the paired
ratios (our images per second / timm's; 1 = as fast).
"""
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import AverageMeter

from timm_spinal.arguments import Parser, number
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.distributed import SignalFlag
from timm_spinal.training.model import check_model_name
from timm_spinal.training.run import Run
from timm_spinal.training.train import open_run, train_epoch

from .timing import Ratio, machine_load, paired_ratio, paired_times

# model, image side, batch size, images of an epoch: enough that its start does not count
CASES = (('resnet18', 224, 16, 128), ('vgg5_pspinal', 28, 128, 1024))
CLASSES = 4


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG folders of smooth random colours, for training and evaluation."""
    rng = np.random.default_rng(0)
    for split, images in (('train', count), ('validation', CLASSES)):
        for i in range(images):
            target = folder / split / f'class{i % CLASSES}'
            target.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(target / f'{i}.jpg', quality=90)


def timm_epoch(config: TrainConfig) -> Callable[[], None]:
    """One epoch as timm's train.py runs it on the CPU or a single device."""
    device = Accelerator().device
    torch.manual_seed(config.seed)
    model = create_model(config.model, num_classes=CLASSES).to(device)
    data = resolve_data_config(dict(input_size=(model.in_chans, config.img_size, config.img_size)), model=model)
    dataset = create_dataset(
        '', root=config.data_dir, split='train', is_training=True, batch_size=config.batch_size,
        input_img_mode='RGB' if model.in_chans == 3 else 'L')
    loader = create_loader(
        dataset,
        input_size=data['input_size'],
        batch_size=config.batch_size,
        is_training=True,
        color_jitter=config.color_jitter or 0.,
        interpolation=config.train_interpolation,
        mean=data['mean'],
        std=data['std'],
        num_workers=config.workers,
        device=device,
    )
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=config.smoothing), device=device, verbose=False)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(config))
    schedule, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=len(loader))
    epoch = 0

    def run() -> None:
        nonlocal epoch
        losses, updates = AverageMeter(), epoch * len(loader)
        task.train()
        optimizer.zero_grad()
        for images, target in loader:
            loss = task(images, target)['loss']
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), images.size(0))
            updates += 1
            optimizer.zero_grad()
            schedule.step_update(num_updates=updates, metric=losses.avg)
        epoch += 1

    return run


def our_epoch(run: Run) -> Callable[[], None]:
    """One epoch of our loop, without evaluation and checkpoint, as on timm's side."""
    flag = SignalFlag()

    def epoch() -> None:
        train_epoch(run, flag)
        run.progress.end_epoch({})

    return epoch


def measure(
        model: str,
        img_size: int,
        batch_size: int,
        images: int,
        workers: int,
        rounds: int,
        progress: bool = False,
) -> tuple[Ratio, float, float]:
    """Ratio of our images per second to timm's, and both in images per second (medians)."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / 'images', images, round(img_size / 0.875))
        config = TrainConfig(
            data_dir=f'{folder}/images', model=model, img_size=img_size, batch_size=batch_size, workers=workers,
            lr=0.01, epochs=10 ** 6, output=folder, experiment='run', log_interval=10 ** 9, sched_on_updates=True)
        with open_run(config) as run:
            our_times, their_times = paired_times(
                our_epoch(run), timm_epoch(config), rounds=rounds, warmup=2, progress=progress)
    trained = images // batch_size * batch_size
    ours, theirs = (trained / statistics.median(times) for times in (our_times, their_times))
    return paired_ratio(their_times, our_times), ours, theirs


def main(argv: list[str] | None = None) -> int:
    """`timm-spinal bench train`; returns the exit code."""
    parser = Parser('timm-spinal bench train', __doc__)
    parser.add_argument('--model', help='this model instead of the two cases')
    parser.add_argument('--img-size', type=number(), default=224)
    parser.add_argument('-b', '--batch-size', type=number(), default=16)
    parser.add_argument('--images', type=number(), default=128, help='images of an epoch')
    parser.add_argument('-j', '--workers', type=number(low=0), default=1)
    parser.add_argument('--rounds', type=number(), default=9, help='pairs of epochs')
    args = parser.parse_args(argv)
    if args.images < args.batch_size:
        raise UserError(f'--images {args.images}: give at least one batch of {args.batch_size}')
    logging.getLogger('timm').setLevel(logging.ERROR)
    cases = [(args.model, args.img_size, args.batch_size, args.images)] if args.model else CASES
    for model, img_size, batch_size, images in cases:
        check_model_name(model)
        ratio, ours, theirs = measure(
            model, img_size, batch_size, images, args.workers, args.rounds, progress=sys.stderr.isatty())
        print(f'{model} at {img_size} px, batch {batch_size}, {args.workers} workers: {ratio} of timm\'s images/s '
              f'(ours {ours:.1f}, timm {theirs:.1f}; {machine_load()})', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
