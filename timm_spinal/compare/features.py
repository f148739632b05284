"""Run a frozen backbone once over all images and write its features to a cache."""
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import numpy as np
import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_spinal.errors import UserError, dead_workers_named
from timm_spinal.models import fold_batchnorm
from timm_spinal.shards import (
    SHARD_SIZE,
    Wording,
    check_space,
    has_shard,
    hash_weights,
    open_cache,
    read_shards,
    shard_count,
    shard_path,
    write_shard,
)
from timm_spinal.training.dataset import SKIPPED_TARGET, ImageData, Split
from timm_spinal.training.distributed import on_main_process
from timm_spinal.training.image_folder import hash_split
from timm_spinal.training.pixels import Decoder
from timm_spinal.training.run_dir import FolderLock
from timm_spinal.training.transforms import (
    create_decoder,
    eval_transform,
    resolve_data,
    split_transform,
    train_transform,
)

from .options import FrozenConfig, as_train_config
from .splits import Splits
from .train_head import Features
from .train_heads import one_core_each

_CPU_BATCH = 16  # small enough for activations to stay in the caches: up to twice the speed of a batch of 128

_WORDS = Wording(
    'features', 'add --rebuild to compute them again, or choose another --features', 'run again, or add --rebuild',
    'choose another --features, or use --train-size or fewer --augment-passes')

Finish = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar('T')


@dataclass(frozen=True)
class Part:
    """One pass over one split; `finish` completes on the device what the transform began in the loader."""
    split: str
    number: int
    source: Split
    transform: Callable
    finish: Finish
    seed: int | None


@dataclass
class Extracted:
    """Features of a backbone and what they depend on.

    Attributes:
        features: By split: pooled vectors (P, N, F), and where made under ``<split>.map`` maps (P, N, C, H, W) or
            tokens (P, N, T, C).
        identity: As in the manifest.
        seconds: Wall time of making them, 0 where the cache had all.
        made: Images that were run through the backbone, all processes together.
        input_size: (C, H, W) of the images.
    """
    features: dict[str, Features]
    identity: dict[str, Any]
    seconds: float
    made: int
    input_size: tuple[int, ...]


def extract(
        config: FrozenConfig,
        model: nn.Module,
        splits: Splits,
        folder: Path,
        accelerator: Accelerator,
        maps: bool = False,
        tokens: bool = False,
) -> Extracted:
    """Make or take from the cache the features of train, validation and test.

    Each process makes its own shards; a run that was interrupted goes on where shards are missing.

    Args:
        config: Augmentation, batch size, workers and what to do with images that cannot be read.
        model: Backbone without classifier, as ``timm.create_model(..., num_classes=0)``.
        splits: The three splits.
        folder: Folder of the features.
        accelerator: Its device and processes are used.
        maps: Keep feature maps beside pooled vectors.
        tokens: Keep the maps, or of a backbone that has none the tokens.

    Raises:
        UserError: A cache of other data, weights or transforms; no space; an unreadable image.
    """
    data_config = resolve_data(as_train_config(config), model)
    parts = list(_parts(config, data_config, splits))
    decode = create_decoder(as_train_config(config), data_config['input_size'][0])
    identity = dict(
        model=config.backbone,
        timm=timm.__version__,
        weights=hash_weights(model),
        data={p.split: hash_split(p.source) for p in parts},
        transform={f'{p.split}-{p.number}': f'{decode} {p.transform} seed {p.seed} skip {config.skip_unreadable}'
                   for p in parts},
        precision=accelerator.mixed_precision,
        maps='as a head reads them' if maps or tokens else False,
    )
    shapes = feature_shapes(config, model, accelerator.device, maps, tokens)
    with accelerator.main_process_first():
        mark = open_cache(folder, identity, _WORDS, config.rebuild and accelerator.is_main_process)
    missing = [(part, index) for part in parts for index in range(shard_count(len(part.source)))
               if not has_shard(shard_path(folder, part.split, part.number, index), mark)]
    total = sum(_rows(part, index) for part, index in missing)
    check_space(folder, total * (4 * sum(map(math.prod, shapes.values())) + 8), _WORDS)
    # no process may write before all have seen what is missing
    accelerator.wait_for_everyone()
    start, lock = time.perf_counter(), FolderLock(folder)
    if missing:
        on_main_process(accelerator, lock.acquire)  # two runs would write the same shards
        model = _folded(model)
    twin = unpooled(model) if maps or tokens else None
    mine = missing[accelerator.process_index::accelerator.num_processes]
    bar = tqdm(total=sum(_rows(*m) for m in mine), desc='features', unit='img',
               disable=None if accelerator.is_main_process and mine else True)
    try:
        for part in parts:
            indices = [index for p, index in mine if p is part]
            if indices:
                with dead_workers_named(lambda: 'run it again: the features that are made are kept'):
                    _run_part(config, model, part, decode, indices, folder, mark, accelerator, twin, bar)
        accelerator.wait_for_everyone()
    finally:
        bar.close()
        lock.release()
    seconds = time.perf_counter() - start if total else 0.
    features = _load(parts, folder, mark) if accelerator.is_main_process else {}
    return Extracted(features, identity, seconds, total, tuple(data_config['input_size']))


@torch.inference_mode()
def feature_shapes(
        config: FrozenConfig,
        model: nn.Module,
        device: torch.device,
        maps: bool,
        tokens: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of one image, by kind; the model is put on the device in evaluation mode.

    Raises:
        UserError: The backbone does not take images of that size, or gives no vector, or no map where ``maps`` is set,
            or neither map nor tokens where ``tokens`` is set.
    """
    model.to(device).eval().requires_grad_(False)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    input_size = resolve_data(as_train_config(config), model)['input_size']
    try:
        twin = unpooled(model) if maps or tokens else None
        outputs = run_backbone(model, torch.zeros(1, *input_size, device=device), twin)
    except (RuntimeError, ValueError, AssertionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f'backbone: it does not accept images of {tuple(input_size)} '
                        f'({" ".join(str(e).split())[:200]}); choose another --img-size or --input-size') from e
    if outputs['pooled'].ndim != 2:
        raise UserError(f'backbone: it returns a map of shape {tuple(outputs["pooled"].shape[1:])} instead of a '
                        'vector; leave out --gp')
    if 'map' in outputs and outputs['map'].ndim != 4 and (maps or outputs['map'].ndim != 3):
        kind = 'tokens' if outputs['map'].ndim == 3 else 'a vector'
        raise UserError(f'--heads: one of the heads needs a feature map, but the backbone gives {kind}; choose another '
                        'backbone')
    return {name: tuple(value.shape[1:]) for name, value in outputs.items()}


def backbone_batch(device: torch.device, batch_size: int) -> int:
    """Images that the backbone gets at a time: a batch, on a CPU fewer."""
    return _CPU_BATCH if device.type == 'cpu' else batch_size


def unpooled(model: nn.Module) -> nn.Module:
    """The model without its pooling, with the same weights in the same memory: what an attached head would read.

    Raises:
        UserError: The model does not go without.
    """
    twin: Any = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    try:
        twin.reset_classifier(0, '')
    except Exception as e:  # each family of timm's raises another error
        raise UserError(f'--heads: a head that takes feature maps is among them, and the backbone always pools '
                        f'({" ".join(str(e).split())[:200]}); choose another backbone') from e
    return twin.eval()


def run_backbone(model: nn.Module, images: torch.Tensor, twin: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Pooled vectors (B, F), and with the model's `unpooled` twin its maps (B, C, H, W) or tokens (B, T, C)."""
    if twin is None:
        return dict(pooled=model(images).float())
    features = model.forward_features(images)  # type: ignore[operator]
    pooled, whole = model.forward_head(features), twin.forward_head(features)  # type: ignore[operator]
    if whole.ndim == 4 and getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
        whole = whole.permute(0, 3, 1, 2)
    return dict(pooled=pooled.float(), map=whole.float())


def _folded(model: nn.Module) -> nn.Module:
    """Without BatchNorm where that can be: the same features to rounding, up to 1.7 times as fast on a CPU."""
    try:
        return fold_batchnorm(model)
    except ValueError:  # torch.fx cannot trace it, or it has none
        return model


def _parts(config: FrozenConfig, data_config: dict[str, Any], splits: Splits) -> Iterator[Part]:
    plain, finish = split_transform(eval_transform(data_config))
    yield Part('train', 0, splits.train, plain, finish, None)
    for number in range(1, config.augment_passes + 1):
        transform, end = split_transform(train_transform(as_train_config(config), data_config))
        yield Part('train', number, splits.train, transform, end, config.seed)
    yield Part('validation', 0, splits.validation, plain, finish, None)
    yield Part('test', 0, splits.test, plain, finish, None)


def _rows(part: Part, index: int) -> int:
    return min(SHARD_SIZE, len(part.source) - index * SHARD_SIZE)


def _seeds(part: Part) -> list[int | None]:
    if part.seed is None:
        return [None] * len(part.source)
    entropy = np.random.SeedSequence([part.seed, part.number])
    return [int(s) for s in entropy.generate_state(len(part.source), np.uint32)]


@torch.inference_mode()
def _run_part(
        config: FrozenConfig,
        model: nn.Module,
        part: Part,
        decode: Decoder,
        indices: list[int],
        folder: Path,
        mark: str,
        accelerator: Accelerator,
        twin: nn.Module | None,
        bar: tqdm,
) -> None:
    """Make some shards of one pass; batches never cross a shard."""
    seeds, batches = _seeds(part), []
    ends: list[int | None] = []  # the shard that a batch completes
    for index in indices:
        rows = range(index * SHARD_SIZE, index * SHARD_SIZE + _rows(part, index))
        for start in range(0, len(rows), config.batch_size):
            batches.append([(i, seeds[i]) for i in rows[start:start + config.batch_size]])
            ends.append(None)
        ends[-1] = index
    dataset = ImageData(part.source, part.transform, decode, 'mark' if config.skip_unreadable else 'raise')
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=min(config.workers, len(batches)), pin_memory=config.pin_mem)
    step = backbone_batch(accelerator.device, config.batch_size)

    @torch.inference_mode()
    def run_chunk(chunk: torch.Tensor) -> dict[str, torch.Tensor]:
        images = chunk.to(accelerator.device, non_blocking=True)
        if config.channels_last:  # while they are bytes, a quarter of the size of floats
            images = images.contiguous(memory_format=torch.channels_last)
        images = part.finish(images)
        with accelerator.autocast():
            return {name: value.cpu() for name, value in run_backbone(model, images, twin).items()}

    kept: dict[str, list[torch.Tensor]] = {}
    with one_core_each() as pool:  # loader workers slow this down less than one chunk on all cores
        run = pool.map if accelerator.device.type == 'cpu' else map
        begun = ((end, labels, run(run_chunk, _as_images(images, part, decode).split(step)))
                 for end, (images, labels) in zip(ends, loader))
        for end, labels, chunks in _one_ahead(begun):
            kept.setdefault('labels', []).append(labels)
            for outputs in chunks:
                for name, value in outputs.items():
                    kept.setdefault(name, []).append(value)
            bar.update(len(labels))
            if end is not None:
                tensors = {name: torch.cat(values).contiguous() for name, values in kept.items()}
                write_shard(shard_path(folder, part.split, part.number, end), tensors, mark)
                kept = {}


def _one_ahead(begun: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next one has been started: no core is idle while the last chunk of a batch ends."""
    waiting = next(begun, None)
    while waiting is not None:
        following = next(begun, None)
        yield waiting
        waiting = following


def _as_images(images: Any, part: Part, decode: Decoder) -> torch.Tensor:
    if not isinstance(images, torch.Tensor):
        raise UserError(f'{part.source.name}: images of mode {decode.mode} have different sizes after the evaluation '
                        'transforms; check --input-size and --crop-mode')
    return images


def _load(parts: list[Part], folder: Path, mark: str) -> dict[str, Features]:
    passes: dict[str, list[dict[str, torch.Tensor]]] = {}
    for part in parts:
        shards = read_shards(folder, part.split, part.number, len(part.source), mark, _WORDS)
        passes.setdefault(part.split, []).append(shards)
    features = {}
    for split, each in passes.items():
        # an image that could not be read is missing in every pass
        good = torch.stack([f['labels'] != SKIPPED_TARGET for f in each]).all(dim=0)
        if not good.any():
            raise UserError(f'{split}: no image of this split can be read; check the data')
        y = each[0]['labels'][good]
        features[split] = Features(torch.stack([f['pooled'][good] for f in each]), y)
        if 'map' in each[0]:
            features[f'{split}.map'] = Features(torch.stack([f['map'][good] for f in each]), y)
    return features
