"""Loops as sides of a comparison: this trainer against timm's, features of a comparison against the bare backbone."""
import shutil
import tempfile
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Iterator

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

from timm_spinal.compare.features import backbone_batch, extract
from timm_spinal.compare.options import FrozenConfig, as_train_config
from timm_spinal.compare.splits import open_splits
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.distributed import SignalFlag
from timm_spinal.training.model import create_model as create_own_model
from timm_spinal.training.run import Run
from timm_spinal.training.train import open_run, train_epoch

from .runner import Call, Setting

CLASSES = 4
FEATURES = 16  # batches of features in a call
_folders: list[tempfile.TemporaryDirectory] = []  # of images; removed when the process ends


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG folders of smooth random colours, for training and evaluation."""
    rng = np.random.default_rng(0)
    for split, images in (('train', count), ('validation', CLASSES)):
        for i in range(images):
            target = folder / split / f'class{i % CLASSES}'
            target.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(target / f'{i}.jpg', quality=90)


def _new_folder(images: int, side: int) -> Path:
    _folders.append(tempfile.TemporaryDirectory())
    folder = Path(_folders[-1].name)
    write_images(folder / 'images', images, side)
    return folder


def train_config(setting: Setting, model: str, **options: Any) -> TrainConfig:
    """The run that both trainers make, on images of its own."""
    folder = _new_folder(setting.batches * setting.batch_size, round(setting.img_size / 0.875))
    return TrainConfig(
        data_dir=str(folder / 'images'), model=model, img_size=setting.img_size, batch_size=setting.batch_size,
        workers=setting.workers, lr=0.01, epochs=10 ** 6, output=str(folder), experiment='run', log_interval=10 ** 9,
        sched_on_updates=True, no_aug=setting.no_aug, **options)


@dataclass
class Epochs:
    """A call that trains a model for an epoch."""
    model: torch.nn.Module
    epochs: Iterator[Any]

    def __call__(self) -> None:
        next(self.epochs)


def _open(held: ExitStack, config: TrainConfig) -> Run:
    """A run before its first update, which says where its images are and how long decoding took."""
    with redirect_stdout(StringIO()) as said:
        run = held.enter_context(open_run(config))
    print(*(line for line in said.getvalue().splitlines() if line.startswith('data ')), sep='\n')
    return run


def our_epochs(setting: Setting, model: str, data_on_device: str = 'auto') -> Epochs:
    """Epochs of our loop, without evaluation and checkpoint, as on timm's side."""
    def epochs() -> Iterator[Any]:
        with ExitStack() as held:
            run = _open(held, train_config(setting, model, data_on_device=data_on_device))
            flag = SignalFlag()
            yield run.task.trained
            while True:
                train_epoch(run, flag)
                run.progress.end_epoch({})
                yield

    started = epochs()
    return Epochs(next(started), started)


def bare_steps(setting: Setting, model: str) -> Epochs:
    """As many steps as an epoch of ours has, forward, backward and optimizer, on one batch that lies in memory."""
    def epochs() -> Iterator[Any]:
        with ExitStack() as held:
            run = _open(held, train_config(setting, model))
            run.data.set_epoch(0)
            images, target = next(iter(run.train_loader))
            run.task.train()
            yield run.task.trained
            while True:
                for _ in range(len(run.train_loader)):
                    run.optimizer.optimizer.zero_grad()
                    loss = run.task(images, target)['loss']
                    loss.backward()
                    run.optimizer.optimizer.step()
                loss.item()  # waits for a GPU, as the end of an epoch does
                yield

    started = epochs()
    return Epochs(next(started), started)


def timm_epochs(setting: Setting, model: str) -> Epochs:
    """Epochs as timm's train.py runs them on one device.

    That is `create_loader` with its defaults (prefetcher on), the task's forward, ``loss.item()``, backward, optimizer,
    and the schedule at each update.
    """
    config, device = train_config(setting, model), Accelerator().device
    torch.manual_seed(config.seed)
    net = create_model(model, num_classes=CLASSES).to(device)
    data = resolve_data_config(dict(input_size=(net.in_chans, config.img_size, config.img_size)), model=net)
    dataset = create_dataset(
        '', root=config.data_dir, split='train', is_training=True, batch_size=config.batch_size,
        input_img_mode='RGB' if net.in_chans == 3 else 'L')
    loader = create_loader(
        dataset,
        input_size=data['input_size'],
        batch_size=config.batch_size,
        is_training=True,
        no_aug=config.no_aug,
        color_jitter=config.color_jitter or 0.,
        interpolation=config.train_interpolation,
        mean=data['mean'],
        std=data['std'],
        num_workers=config.workers,
        device=device,
    )
    task = ClassificationTask(net, criterion_kwargs=dict(smoothing=config.smoothing), device=device, verbose=False)
    optimizer = create_optimizer_v2(net, **optimizer_kwargs(config))
    schedule, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=len(loader))

    def epochs() -> Iterator[None]:
        updates = 0
        while True:
            losses = AverageMeter()
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
            yield

    return Epochs(net, epochs())


def features(setting: Setting, backbone: str) -> Call:
    """Read JPEGs, transform them, run the backbone and write shards, as `timm-spinal compare` does."""
    folder = _new_folder(FEATURES * setting.batch_size, setting.img_size)
    config = FrozenConfig(
        backbone=backbone, data_dir=str(folder / 'images'), img_size=setting.img_size, batch_size=setting.batch_size,
        workers=setting.workers, channels_last=True, model='')
    own = as_train_config(config)
    splits, accelerator = open_splits(own), Accelerator()
    model = create_own_model(own, 0).to(accelerator.device).to(memory_format=torch.channels_last).eval()

    def call() -> None:
        shutil.rmtree(folder / 'features', ignore_errors=True)
        extract(config, model, splits, folder / 'features', accelerator)

    return call


def bare_backbone(setting: Setting, backbone: str) -> Call:
    """The backbone as timm makes it, on as many images that lie in memory, in batches of the size that suits it."""
    device = Accelerator().device
    model = create_model(backbone, num_classes=0).to(device).to(memory_format=torch.channels_last).eval()
    step = backbone_batch(device, setting.batch_size)
    batch = torch.rand(step, 3, setting.img_size, setting.img_size, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    count = FEATURES * setting.batch_size + CLASSES

    @torch.inference_mode()
    def call() -> None:
        for start in range(0, count, step):
            model(batch[:count - start]).cpu()

    return call
