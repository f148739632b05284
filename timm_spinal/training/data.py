"""From a config to loaders.

`create_datasets` opens the splits and settles the number of classes, which the model needs; `create_data` adds the
transforms, which need the model::

    datasets = create_datasets(config)
    model = timm.create_model(config.model, num_classes=datasets.num_classes)
    data = create_data(config, model, datasets)
    for epoch in range(config.epochs):
        data.set_epoch(epoch)
        for images, targets in data.train_loader: ...

The loaders are plain torch loaders, made to be given to `accelerator.prepare`. Batches depend on (seed, epoch,
position) only; see `sampling` and `dataset`. Streamed sources are the exception.
"""
import contextlib
import logging
import re
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from timm.data import Mixup
from torch import nn
from torch.utils.data import DataLoader, Dataset

from timm_spinal.errors import UserError

from .config import LoaderOptions, LoopConfig, TrainConfig, ValidateConfig
from .dataset import ImageData, Source, StreamData
from .image_files import shown
from .overview import check_classes
from .pixels import Decoder
from .readers import check_names
from .sampling import EvalSampler, TrainSampler, epoch_length, images_of_passes, stratified_split
from .sources import open_source
from .torch_sources import torch_split
from .transforms import create_decoder, eval_transform, resolve_data, ten_crop_transform, train_transform

_logger = logging.getLogger(__name__)


@dataclass
class Datasets:
    """The splits of a run before any transform; ``train`` and ``test`` are None where they were not asked for."""
    train: Source | None
    eval: Source
    test: Source | None
    num_classes: int
    class_names: list[str] | None
    multi_label: bool = False

    def named(self, config: TrainConfig) -> dict[str, Source | None]:
        """The splits by the names that a config gives them."""
        validation = f'part of {config.train_split}' if config.val_split_fraction else config.val_split
        return {config.train_split: self.train, validation: self.eval, config.test_split: self.test}


@dataclass
class TrainData:
    """Loaders of a run and what they are made of.

    Attributes:
        train_loader: Shuffled and augmented batches of (B, C, H, W) float images and (B,) classes, all of them full,
            see `sampling.epoch_length`. Where images have several classes, float memberships (B, num_classes).
        eval_loader: Every image of the evaluation split once; class -1 marks an image to leave out.
        test_loader: The same for --test-split, or None.
        mixup: To call on each training batch, or None.
        data_config: As `timm.data.resolve_data_config`.
        streamed: The training data come from a stream: no exact resume within an epoch.
        multi_label: Images have several classes.
        mixup_off_epoch: No mixing from this epoch on, when above 0.
        channels_last: Lay training batches out so.
    """
    train_loader: DataLoader
    eval_loader: DataLoader
    test_loader: DataLoader | None
    mixup: Mixup | None
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

    def set_epoch(self, epoch: int) -> None:
        """Set order and augmentation of the epoch that is iterated next; also after `accelerator.prepare`."""
        target: Any = self.train_loader.dataset if self.streamed else self.train_loader.sampler
        target.begin_epoch(epoch)
        if self.mixup is not None and self.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.mixup_off_epoch

    def arrange(self, images: Any, target: Any) -> tuple[Any, Any]:
        """A training batch on its device, laid out and mixed as the task gets it."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return (images, target) if self.mixup is None else self.mixup(images, target)

    def skipped(self) -> int:
        """Different images found to be unreadable so far, by this process and its workers."""
        loaders = (self.train_loader, self.eval_loader, self.test_loader)
        return sum(count_skipped(loader) for loader in loaders if loader is not None)


def count_skipped(loader: DataLoader) -> int:
    """Different images of a loader found to be unreadable so far."""
    unreadable = getattr(loader.dataset, 'unreadable', None)
    return 0 if unreadable is None else int(unreadable.sum())


# ---- splits -----------------------------------------------------------------------------------------------------


def create_datasets(config: TrainConfig | ValidateConfig, train: bool = True) -> Datasets:
    """Open the splits that a config names and settle the number of classes.

    Args:
        config: The run's config.
        train: Open the training split; validation needs the evaluation split only.

    Raises:
        UserError: Data that are missing, empty, unknown or inconsistent, one class only in training, or more classes
            than --num-classes.
    """
    train_source: Source | None
    if config.val_split_fraction:
        whole = open_source(config, config.train_split, whole=True)
        if whole.multi_label:
            raise UserError(f'--val-split-fraction: the pairs of {config.dataset} share digits, so that a part of them '
                            f'is not apart from the rest; leave it out: its split validation has digits of its own')
        if whole.labels is None:
            raise UserError(f'--val-split-fraction: the classes of {whole.name} are not known beforehand; '
                            f'name a split with --val-split')
        first, second = stratified_split(whole.labels, config.val_split_fraction, config.seed)
        train_source, eval_source = whole.subset(first), whole.subset(second)
    else:
        train_source = open_source(config, config.train_split, training=True) if train else None
        eval_source = _matched(config, config.val_split, train_source)
        _tell_if_test(config)
    test_source = _matched(config, config.test_split, train_source) if train and config.test_split else None
    if train and train_source is not None:
        check_classes(train_source)
    return Datasets(
        train_source if train else None,
        eval_source,
        test_source,
        _num_classes(config, [s for s in (train_source, eval_source, test_source) if s is not None]),
        (train_source or eval_source).class_names,
        eval_source.multi_label,
    )


def _matched(config: TrainConfig | ValidateConfig, split: str, train: Source | None) -> Source:
    """A split whose classes have the indices that they have in training."""
    source = open_source(config, split)
    if train is None or not train.class_names or not source.class_names or train.class_names == source.class_names:
        return source
    unknown = [name for name in source.class_names if name not in train.class_names]
    check_names({*train.class_names, *unknown}, source.name)
    if unknown:
        names = ', '.join(map(shown, unknown[:5])) + (', ...' if len(unknown) > 5 else '')
        raise UserError(f'classes: {source.name} has {len(unknown)} that {train.name} has not ({names}); use the same '
                        f'class names in both')
    return open_source(config, split, class_map={name: i for i, name in enumerate(train.class_names)})


def _num_classes(config: TrainConfig | ValidateConfig, sources: list[Source]) -> int:
    counts = [len(s.class_names or ()) for s in sources]
    counts += [int(s.labels.max()) + 1 for s in sources if s.labels is not None and len(s.labels)]
    found = max(counts)
    if config.num_classes is None:
        if not found:
            raise UserError(f'dataset {config.dataset}: its classes are not known; give their number with '
                            f'--num-classes')
        return found
    if found > config.num_classes:
        raise UserError(f'--num-classes {config.num_classes}: the data have {found} classes; give {found} or leave it '
                        f'out')
    if any(source.multi_label for source in sources) and found < config.num_classes:
        raise UserError(f'--num-classes {config.num_classes}: dataset {config.dataset} has {found}; leave it out')
    if 0 < found < config.num_classes:
        _logger.warning(f'--num-classes {config.num_classes}: the data have {found} classes, the rest stays unused')
    return config.num_classes


def _tell_if_test(config: TrainConfig | ValidateConfig) -> None:
    prefix, _, name = config.dataset.partition('/')
    if not isinstance(config, TrainConfig) or prefix.lower() != 'torch' or config.val_split == 'test':
        return
    if torch_split(name.lower(), config.val_split) == 'test':
        _logger.warning(f'{config.dataset} has no validation split: the test split chooses the best epoch; '
                        f'--val-split-fraction 0.1 --test-split test keeps it for the end')


# ---- loaders ----------------------------------------------------------------------------------------------------


def create_data(
        config: TrainConfig,
        model: nn.Module,
        datasets: Datasets,
        seed: int | None = None,
        num_processes: int = 1,
        accum: int = 1,
) -> TrainData:
    """Loaders for a run.

    Args:
        config: The run's config.
        model: Its input size, channels, mean and std are used where the config gives none.
        datasets: From `create_datasets`.
        seed: Of order and augmentation, the same in every process; ``config.seed`` when None.
        num_processes: Processes that `accelerator.prepare` will share the batches out to.
        accum: Batches of an update.

    Raises:
        UserError: A batch size that leaves no full batch, or does not fit mixing; augmentation that timm refuses; a
            streamed source in several processes.
    """
    seed = config.seed if seed is None else seed
    train = datasets.train
    assert train is not None, 'create_datasets was called with train=False'
    _check_source(config, train, num_processes)
    data_config = resolve_data(config, model)
    decode = create_decoder(config, data_config['input_size'][0])
    transform = train_transform(config, data_config)
    if train.streamed:
        dataset: Dataset = StreamData(train, transform, decode, seed)
        sampler = None
    else:
        dataset = ImageData(train, transform, decode, 'replace' if config.skip_unreadable else 'raise')
        sampler = create_sampler(config, len(train), seed, num_processes, accum, config.aug_repeats)
    mixing = config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
    return TrainData(
        train_loader=create_loader(config, dataset, sampler, config.batch_size, drop_last=True),
        eval_loader=_eval_loader(config, datasets.eval, eval_transform(data_config), decode),
        test_loader=_eval_loader(config, datasets.test, eval_transform(data_config), decode) if datasets.test else None,
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
        UserError: The data have not the model's classes, or its images cannot be cropped so.
    """
    have, want = datasets.num_classes, getattr(model, 'num_classes', datasets.num_classes)
    if have > want or (have < want and (datasets.multi_label or not config.dataset and not config.class_map)):
        raise UserError(f'classes: {datasets.eval.name} has {have}, the model {want}; use the data it was trained for'
                        f', or number the folders with --class-map')
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
        share = f' for each of {num_processes} processes' if num_processes > 1 else ''
        raise UserError(f'--batch-size {config.batch_size}: an epoch has {images} images, not one full batch{share}; '
                        f'use --batch-size {max(1, images // num_processes)} or less')


def _check_source(config: TrainConfig, train: Source, num_processes: int) -> None:
    batch = config.batch_size
    if train.streamed and num_processes > 1:
        raise UserError(f'dataset {config.dataset}: streamed sources are read by one process only; use '
                        f'--num_processes 1, or the same data by hfds/ or as a folder')
    if train.streamed:
        _check_batch(config, len(train), num_processes)
    if batch % 2 and (config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None):
        raise UserError(f'--batch-size {batch}: mixup and cutmix pair the images of a batch; use an even number')


def _mixup(config: TrainConfig, datasets: Datasets) -> Mixup:
    return Mixup(
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
        source: Source,
        transform: Callable,
        decode: Decoder,
) -> DataLoader:
    batch = config.validation_batch_size or config.batch_size
    if source.streamed:
        return create_loader(config, StreamData(source, transform, decode, config.seed), None, batch)
    dataset = ImageData(source, transform, decode, 'mark' if config.skip_unreadable else 'raise')
    return create_loader(config, dataset, EvalSampler(len(source)), batch)


@contextlib.contextmanager
def dead_workers_named(advice: Callable[[], str]) -> Iterator[None]:
    """One line in place of torch's error about a loader worker that was killed.

    Args:
        advice: What to do next, asked for when it happens.

    Raises:
        UserError: Names the worker, the likely reason and what to do.
    """
    try:
        yield
    except RuntimeError as e:
        found = re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]*)', str(e))
        if found is None:
            raise
        process, what = found[1], ' '.join(found[2].split())
        memory = 'shared memory (/dev/shm)' if 'Bus error' in what else 'memory'
        error = UserError(f'loader worker {process} {what}: most likely the machine is out of {memory}; use fewer '
                          f'--workers or a smaller --batch-size, then {advice()}')
        error.local = True  # type: ignore[attr-defined]
        raise error from e


def create_loader(
        config: LoaderOptions,
        dataset: Dataset,
        sampler: Any,
        batch_size: int,
        drop_last: bool = False,
) -> DataLoader:
    """A torch loader with the workers of a config; a data set may bring a ``collate`` of its own."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        drop_last=drop_last,
        collate_fn=getattr(dataset, 'collate', None),
        persistent_workers=config.workers > 0,
        # its own, so that starting an epoch draws nothing from the global stream
        generator=torch.Generator().manual_seed(config.seed),
    )
