"""From a config to loaders.

`create_datasets` opens the splits and counts their classes, which the model needs to know; `create_data` adds the
transforms, which need the model::

    datasets = create_datasets(config)
    model = timm.create_model(config.model, num_classes=datasets.num_classes)
    data = create_data(config, model, datasets)
    for epoch in range(config.epochs):
        data.set_epoch(epoch)
        for images, targets in data.train_loader: ...

The loaders are plain torch loaders, made to be given to `accelerator.prepare`. Batches depend on (seed, epoch,
position) only; see `dataset`. Streamed data sets are the exception.
"""
from dataclasses import dataclass
from typing import Any, Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from timm_spinal.errors import UserError

from .batches import BatchMixup, Finish
from .config import LoaderOptions, LoopConfig, TrainConfig, ValidateConfig
from .dataset import EvalSampler, ImageData, Split, StreamData, TrainSampler, epoch_length, images_of_passes
from .device_data import DeviceData, open_on_device
from .pixels import Decoder
from .splits import Datasets
from .transforms import create_decoder, eval_transform, resolve_data, ten_crop_transform, train_transform


@dataclass
class TrainData:
    """Loaders of a run and what they are made of.

    Attributes:
        train_loader: Shuffled and augmented batches of (B, C, H, W) float images and (B,) classes, all of them full,
            see `dataset.epoch_length`. Where images have several classes, float memberships (B, num_classes).
        eval_loader: Every image of the evaluation split once; class -1 marks an image to leave out.
        test_loader: The same for --test-split, or None.
        mixup: To call on each training batch, or None.
        data_config: As `timm.data.resolve_data_config`.
        streamed: The training data come from a stream: no exact resume within an epoch.
        multi_label: Images have several classes.
        mixup_off_epoch: No mixing from this epoch on, when above 0.
        channels_last: Training images get torch's channels-last memory format.
        finish: What is left of the transform for batches on the device; None where the loader does all of it.
        augmented_on_device: Training images are changed at random, on the device.
    """
    train_loader: DataLoader
    eval_loader: DataLoader
    test_loader: DataLoader | None
    mixup: BatchMixup | None
    num_classes: int
    class_names: list[str] | None
    data_config: dict[str, Any]
    train_size: int
    eval_size: int
    test_size: int
    streamed: bool = False
    multi_label: bool = False
    mixup_off_epoch: int = 0
    channels_last: bool = False
    finish: Finish | None = None
    augmented_on_device: bool = False

    @property
    def loaders(self) -> list[DataLoader]:
        """All that there are."""
        return [x for x in (self.train_loader, self.eval_loader, self.test_loader) if x is not None]

    def set_epoch(self, epoch: int) -> None:
        """Set order and augmentation of the epoch that is iterated next; also after `accelerator.prepare`."""
        loader: Any = self.train_loader
        (loader.sampler if hasattr(loader.sampler, 'begin_epoch') else loader.dataset).begin_epoch(epoch)
        if self.mixup is not None and self.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.mixup_off_epoch

    def to_batch(self, images: Any, target: Any, *given: torch.Tensor) -> tuple:
        """A training batch as the task gets it: normalised, in the memory format of the run, and mixed.

        Args:
            images: As the loader gives them, on the device.
            target: Their targets.
            given: What the loader gives beside them; boxes to erase are used up.
        """
        if self.channels_last:  # while they are bytes, a quarter of the size of floats
            images = images.contiguous(memory_format=torch.channels_last)
        if self.finish is not None:
            images, *rest = self.finish(images, *given)
            given = tuple(rest)
        images, target = (images, target) if self.mixup is None else self.mixup(images, target)
        return images, target, *given

    def skipped(self) -> int:
        """Different images found to be unreadable so far, by this process and its workers."""
        return sum(map(count_skipped, self.loaders))


def count_skipped(loader: DataLoader) -> int:
    """Different images of a loader found to be unreadable so far."""
    unreadable = getattr(loader.dataset, 'unreadable', None)
    return 0 if unreadable is None else int(unreadable.sum())


def create_data(
        config: TrainConfig,
        model: nn.Module,
        datasets: Datasets,
        seed: int | None = None,
        num_processes: int = 1,
        accum: int = 1,
        on_device: bool = False,
        accelerator: Accelerator | None = None,
        begun_on_device: bool | None = None,
) -> TrainData:
    """Loaders for a run.

    Args:
        config: The run's config.
        model: Its input size, channels, mean and std are used where the config gives none.
        datasets: From `create_datasets`.
        seed: Of order and augmentation, the same in every process; ``config.seed`` when None.
        num_processes: Processes that `accelerator.prepare` will share the batches out to.
        accum: Batches of an update.
        on_device: The training loader gives bytes, which `TrainData.to_batch` normalises and erases on the device.
        accelerator: Of the run. Splits may live on its device, as --data-on-device says; without it they do not.
        begun_on_device: Whether a run that is resumed was begun with augmentation on the device; None for a new run.

    Raises:
        UserError: A batch size that leaves no full batch, or does not fit mixing; augmentation that timm refuses; a
            streamed data set in several processes; a split that cannot live on the device as it must.
    """
    seed = config.seed if seed is None else seed
    train = datasets.train
    assert train is not None, 'create_datasets was called with train=False'
    _check_batches(config, train, num_processes)
    data_config = resolve_data(config, model)
    decode = create_decoder(config, data_config['input_size'][0])
    transform = train_transform(config, data_config)
    sampler = None
    if not train.streamed:
        sampler = create_sampler(config, len(train), seed, num_processes, accum, config.aug_repeats)
    dataset: DeviceData | StreamData | ImageData | None = open_on_device(
        config, train, transform, decode, accelerator, sampler, begun_on_device)
    if dataset is None and train.streamed:
        dataset = StreamData(train, transform, decode, seed, on_device)
    elif dataset is None:
        dataset = ImageData(train, transform, decode, 'replace' if config.skip_unreadable else 'raise', on_device)
    mixing = config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
    return TrainData(
        train_loader=create_loader(config, dataset, sampler, config.batch_size, drop_last=True),
        eval_loader=_eval_loader(config, datasets.eval, eval_transform(data_config), decode, accelerator),
        # a split that is evaluated once need not be kept
        test_loader=_eval_loader(
            config, datasets.test, eval_transform(data_config), decode,
            accelerator if config.data_on_device == 'always' else None) if datasets.test else None,
        mixup=_mixup(config, datasets) if mixing else None,
        num_classes=datasets.num_classes,
        class_names=datasets.class_names,
        data_config=data_config,
        train_size=len(train),
        eval_size=len(datasets.eval),
        test_size=len(datasets.test) if datasets.test else 0,
        streamed=train.streamed,
        multi_label=datasets.multi_label,
        mixup_off_epoch=config.mixup_off_epoch,
        channels_last=config.channels_last,
        finish=None if isinstance(dataset, DeviceData) or not on_device else dataset.finish,
        augmented_on_device=isinstance(dataset, DeviceData) and bool(dataset.augment.steps),
    )


def create_eval_loader(
        config: TrainConfig | ValidateConfig,
        model: nn.Module,
        datasets: Datasets,
        crops: int = 1,
) -> tuple[DataLoader, dict[str, Any]]:
    """The evaluation loader and the data config, for validation of a trained model.

    Args:
        config: Where the data are, batch size and workers.
        model: Its classes, input size, channels, mean and std are used.
        datasets: From `create_datasets`.
        crops: 1, or 10 for batches of (B, 10, C, H, W).

    Raises:
        UserError: The data have other classes than the model, or the crop mode does not go with ten crops.
    """
    have, want = datasets.num_classes, getattr(model, 'num_classes', datasets.num_classes)
    if have > want or (have < want and (datasets.multi_label or not config.dataset and not config.class_map)):
        raise UserError(f'classes: {datasets.eval.name} has {have} classes, the model has {want}; use the data it was '
                        'trained for, or number the folders with --class-map')
    data_config = resolve_data(config, model)
    decode = create_decoder(config, data_config['input_size'][0])
    transform = ten_crop_transform(data_config) if crops == 10 else eval_transform(data_config)
    return _eval_loader(config, datasets.eval, transform, decode), data_config


def create_sampler(
        config: LoopConfig,
        size: int,
        seed: int,
        num_processes: int,
        accum: int = 1,
        aug_repeats: float = 0,
) -> TrainSampler:
    """The order of ``size`` training images, with epochs as long as the config asks for.

    Raises:
        UserError: A batch size that leaves no full batch.
    """
    images = images_of_passes(size, config.epoch_repeats)
    _check_batch(config, images, num_processes)
    batch = config.batch_size * num_processes
    length = epoch_length(images, batch, batch * accum, -(-config.min_updates // config.epochs))
    return TrainSampler(size, seed, aug_repeats, length=length)


def _check_batch(config: LoopConfig, images: int, num_processes: int) -> None:
    if images < config.batch_size * num_processes:
        share = f' in each of {num_processes} processes' if num_processes > 1 else ''
        raise UserError(f'--batch-size {config.batch_size}{share}: is more than the {images} images of an epoch; '
                        f'use --batch-size {max(1, images // num_processes)} or less')


def _check_batches(config: TrainConfig, train: Split, num_processes: int) -> None:
    batch = config.batch_size
    if train.streamed and num_processes > 1:
        raise UserError(f'dataset {config.dataset}: streamed sources are read by one process only; use '
                        f'--num_processes 1, or the same data by hfds/ or as a folder')
    if train.streamed:
        _check_batch(config, len(train), num_processes)
    if batch % 2 and (config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None):
        raise UserError(f'--batch-size {batch}: mixup and cutmix pair the images of a batch; use an even number')


def _mixup(config: TrainConfig, datasets: Datasets) -> BatchMixup:
    return BatchMixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=datasets.num_classes,
        multi_label=datasets.multi_label,
    )


def _eval_loader(
        config: TrainConfig | ValidateConfig,
        split: Split,
        transform: Callable,
        decode: Decoder,
        accelerator: Accelerator | None = None,
) -> DataLoader:
    batch = config.validation_batch_size or config.batch_size
    if isinstance(config, TrainConfig):
        on_device = open_on_device(config, split, transform, decode, accelerator)
        if on_device is not None:
            return create_loader(config, on_device, None, batch)
    if split.streamed:
        return create_loader(config, StreamData(split, transform, decode, config.seed), None, batch)
    dataset = ImageData(split, transform, decode, 'mark' if config.skip_unreadable else 'raise')
    return create_loader(config, dataset, EvalSampler(len(split)), batch)


def create_loader(
        config: LoaderOptions,
        dataset: Dataset,
        sampler: Any,
        batch_size: int,
        drop_last: bool = False,
) -> DataLoader:
    """A torch loader with the workers of a config; a data set may bring a ``collate`` of its own.

    Data on the device bring their own order, and need neither workers nor pinned memory.
    """
    on_device = isinstance(dataset, DeviceData)
    workers = 0 if on_device else config.workers
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=dataset.order if isinstance(dataset, DeviceData) else sampler,
        num_workers=workers,
        pin_memory=config.pin_mem and not on_device,
        drop_last=drop_last,
        collate_fn=getattr(dataset, 'collate', None),
        persistent_workers=workers > 0,
        # its own, so that starting an epoch draws nothing from the global stream
        generator=torch.Generator().manual_seed(config.seed),
    )
