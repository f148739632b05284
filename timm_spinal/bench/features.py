"""Speed of `timm-spinal compare` on a frozen backbone: making the features, and training heads on them.

    timm-spinal bench features                                          # tf_efficientnet_lite0 at 128 px
    timm-spinal bench features --backbone resnet18 --img-size 96 --images 512

Features: reading JPEGs, transforming, the backbone without its BatchNorms and writing shards, against the bare backbone
as timm makes it, on batches of the size it is fastest with, that lie in memory, in turns in one run; 1 = as fast.
Heads: seconds of training ``linear``, ``mlp``, ``spinal`` and ``pspinal`` with their defaults on random features.
"""
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from timm_spinal.arguments import Parser, number
from timm_spinal.compare.controls import new_heads, parse_variants, size_controls
from timm_spinal.compare.features import backbone_batch, extract
from timm_spinal.compare.options import FrozenConfig, as_train_config
from timm_spinal.compare.splits import open_splits
from timm_spinal.compare.train_head import Features
from timm_spinal.compare.train_heads import HeadTask, train_heads
from timm_spinal.training.model import create_model

from .timing import Ratio, machine_load, paired_ratio, paired_times
from .train import write_images

HEADS = 'linear,mlp:width=512,spinal,pspinal'
CLASSES, WIDTH = 10, 1280


def measure_features(config: FrozenConfig, size: int, images: int, rounds: int) -> tuple[Ratio, float, float]:
    """Ratio of the images per second of `extract` to those of the bare backbone, and both (medians).

    Args:
        config: Backbone and loader.
        size: Pixels of an image's side.
        images: Number of images.
        rounds: How often each side runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / 'images', images, size)
        config.data_dir = f'{folder}/images'
        train_config = as_train_config(config)
        splits = open_splits(train_config)
        model, accelerator = create_model(train_config, 0), Accelerator()
        count = sum(len(split) for split in (splits.train, splits.validation, splits.test))
        step = backbone_batch(accelerator.device, config.batch_size)
        batch = torch.rand(step, 3, size, size, device=accelerator.device)
        model.to(accelerator.device).eval()
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
            batch = batch.contiguous(memory_format=torch.channels_last)

        def ours() -> None:
            shutil.rmtree(f'{folder}/features', ignore_errors=True)
            extract(config, model, splits, Path(folder) / 'features', accelerator)

        @torch.inference_mode()
        def bare() -> None:
            for start in range(0, count, step):
                model(batch[:count - start]).cpu()

        times = paired_times(ours, bare, rounds=rounds, warmup=1)
    speeds = [count / statistics.median(t) for t in times]
    return paired_ratio(times[1], times[0]), speeds[0], speeds[1]


def measure_heads(size: int, seeds: int, epochs: int) -> tuple[float, dict[str, float]]:
    """Seconds of training the four heads on ``size`` features of 1,280 numbers, 10 % of them for validation.

    Returns:
        Wall time of all, and the seconds of each head, summed over its seeds: the seeds run side by side.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (size,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    x = (0.2 * centres[y] + torch.randn(size, WIDTH, generator=generator)).relu()[None]
    cut = size // 10
    train, validation = Features(x[:, cut:], y[cut:]), Features(x[:, :cut], y[:cut])
    variants = size_controls(parse_variants(HEADS), WIDTH, CLASSES)
    recipe = FrozenConfig(epochs=epochs).recipe(len(train.y))
    tasks = [HeadTask(partial(new_heads, variant, WIDTH, CLASSES), list(range(seeds)), train, validation, recipe)
             for variant in variants]
    spent = {variant.name: 0. for variant in variants}
    start = time.perf_counter()
    for i, trained in train_heads(tasks):
        spent[variants[i].name] += trained.seconds
    return time.perf_counter() - start, spent


def main(argv: list[str] | None = None) -> int:
    """`timm-spinal bench features`; returns the exit code."""
    parser = Parser('timm-spinal bench features', __doc__)
    parser.add_argument('--backbone', default='tf_efficientnet_lite0')
    parser.add_argument('--img-size', type=number(), default=128)
    parser.add_argument('-b', '--batch-size', type=number(), default=128)
    parser.add_argument('-j', '--workers', type=number(low=0), default=2)
    parser.add_argument('--images', type=number(low=40), default=2000, help='images of a round')
    parser.add_argument('--rounds', type=number(), default=3)
    parser.add_argument('--features', type=number(low=300), default=10000, help='features that heads are trained on')
    parser.add_argument('--seeds', type=number(), default=5)
    parser.add_argument('--epochs', type=number(), default=30)
    args = parser.parse_args(argv)
    config = FrozenConfig(backbone=args.backbone, img_size=args.img_size, batch_size=args.batch_size,
                          workers=args.workers, channels_last=True, model='')
    ratio, ours, bare = measure_features(config, args.img_size, args.images, args.rounds)
    print(f'features of {args.backbone} at {args.img_size} px, batch {args.batch_size}, {args.workers} workers: '
          f'{ratio} of the bare backbone (ours {ours:.0f}, bare {bare:.0f} images/s; {machine_load()})', flush=True)
    total, spent = measure_heads(args.features, args.seeds, args.epochs)
    for name, seconds in spent.items():
        print(f'    {name}: {seconds:.1f} s, its seeds one after the other')
    print(f'4 heads x {args.seeds} seeds x {args.epochs} epochs on {args.features:,} features: {total:.0f} s '
          f'side by side ({machine_load()})')
    return 0


if __name__ == '__main__':
    sys.exit(main())
