"""Splits that live on the device: decoded once, kept as bytes, and augmented there in batches.

A split is kept where it fits and where the device can do what the transform draws at random; else it goes through the
ordinary loader. Decoded images are cached as safetensors in the user's cache. The file names what it was made from
(names, sizes and times of the images, how they are decoded), and is not used for anything else.

Order and augmentation of an epoch are functions of (seed, epoch, position), as in `dataset`: a loader yields positions,
and `DeviceData.begin_epoch` draws what belongs to them.
"""
import contextlib
import hashlib
import math
import os
import re
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import PIL
import psutil
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from torchvision import transforms
from tqdm import tqdm

from timm_spinal.errors import UserError
from timm_spinal.files import write_atomically

from .config import TrainConfig
from .dataset import ImageData, Split, TrainSampler
from .device_augment import Augment, NotOnDevice, to_device_steps
from .distributed import on_main_process
from .image_folder import hash_split
from .pixels import Decoder

MEMORY_SHARE = 0.25  # of the free memory, for a split
CPU_AUGMENTED_SIDE = 64  # pixels; larger images take the CPU so long to augment that workers are the better place
IMAGES_OF_A_WORKER = 500  # to decode: fewer are decoded before a worker has started
MIB = 2 ** 20
# limit and use of a container's memory, in the two versions of Linux control groups
CGROUPS = (
    ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory.current'),
    ('/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory/memory.usage_in_bytes'),
)


@dataclass
class Decoded:
    """The images of a split.

    Attributes:
        images: (N, C, H, W) of bytes; black where they cannot be read.
        targets: Classes (N,), or memberships (N, classes).
        unreadable: (N,) of bool.
        origin: Where they came from, as text.
    """
    images: torch.Tensor
    targets: torch.Tensor
    unreadable: torch.Tensor
    origin: str = ''


class DeviceData(Dataset):
    """A split on a device: ``data[positions]`` is a batch of normalised images (B, C, H, W) and their targets.

    Without a sampler the positions are the numbers of the images, as evaluation takes them.

    Args:
        split: The images.
        decoded: Their pixels.
        augment: From bytes to normalised floats.
        device: Where they are kept.
        sampler: Gives the order of each epoch; it is not iterated.
        counts: Whether this process reports the images that cannot be read.
        decode: Gives `picture` its images in one mode; `Decoder()` when None.

    Attributes:
        rows: As `ImageData.rows`.
        unreadable: 1 for each image that cannot be read.

    Raises:
        UserError: Too many images in a row that cannot be read, for training.
    """
    lives_on_device = True  # nothing to pin

    def __init__(
            self,
            split: Split,
            decoded: Decoded,
            augment: Augment,
            device: torch.device,
            sampler: TrainSampler | None = None,
            counts: bool = True,
            decode: Decoder | None = None,
    ):
        self.decode = decode or Decoder()
        self.split, self.augment, self.device, self.sampler = split, augment, device, sampler
        self.images, self.targets = decoded.images.to(device), decoded.targets.to(device)
        self.unreadable = decoded.unreadable.to(torch.uint8) * counts
        self.rows: Any = None
        self._readable = _next_readable(decoded.unreadable, split) if sampler else torch.arange(len(split))
        self._set_order(self._readable)
        self._drawn: list[dict[str, torch.Tensor]] = [{} for _ in augment.steps]

    def __len__(self) -> int:
        return len(self.split)

    @property
    def order(self) -> Any:
        """A sampler of the positions of an epoch."""
        return SequentialSampler(range(len(self.sampler or self)))

    def begin_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of an epoch."""
        assert self.sampler is not None, 'a split without sampler has no epochs'
        self.sampler.begin_epoch(epoch)
        self._set_order(self._readable[self.sampler.draw()[0]])
        size = self.images.shape[-2], self.images.shape[-1]
        drawn = self.augment.draw(len(self.sampler), size, self.sampler.seed, epoch)
        self._drawn = [{k: v.to(self.device, non_blocking=True) for k, v in step.items()} for step in drawn]

    def _set_order(self, order: torch.Tensor) -> None:
        self._host_order, self._order = order, order.to(self.device, non_blocking=True)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, Any]:
        images, targets, *_ = self.__getitems__([position])
        return images[0], targets[0].tolist()

    def __getitems__(self, positions: list[int]) -> tuple[torch.Tensor, ...]:
        where: Any = slice(positions[0], positions[-1] + 1)
        if positions != list(range(where.start, where.stop)):  # the last batch of an evaluation by several processes
            where = torch.tensor(positions).to(self.device, non_blocking=True)
        chosen = self._order[where]
        drawn = [{name: values[where] for name, values in step.items()} for step in self._drawn]
        batch = self.augment(self.images.index_select(0, chosen), drawn), self.targets.index_select(0, chosen)
        if self.rows is None:
            return batch
        rows = [self.rows[self.split.number(i)] for i in self._host_order[torch.tensor(positions)].tolist()]
        return *batch, torch.stack(rows)

    picture = ImageData.picture

    @staticmethod
    def collate(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The loader's ``collate_fn``: batches come whole."""
        return batch


def _next_readable(unreadable: torch.Tensor, split: Split) -> torch.Tensor:
    """For each image itself, or the next one that can be read, as `ImageData` replaces it."""
    readable = torch.cat([torch.nonzero(~unreadable)[:, 0] + start for start in (0, len(split))])
    chosen = torch.searchsorted(readable, torch.arange(len(split)))
    if not len(readable) or int((readable[chosen] - torch.arange(len(split))).max()) >= ImageData.max_tries:
        raise UserError(f'{ImageData.max_tries} images in a row cannot be read from {split.name}; check the data')
    return readable[chosen] % len(split)


# ---- which splits, and how ------------------------------------------------------------------------------------------


def open_on_device(
        config: TrainConfig,
        split: Split,
        transform: Callable,
        decode: Decoder,
        accelerator: Accelerator | None,
        sampler: TrainSampler | None = None,
        begun: bool | None = None,
) -> DeviceData | None:
    """A split on the device, or None where the ordinary loader is to read it. Every process calls it.

    A line says why a split is not kept on the device, and how large it is there.

    Args:
        config: The run's config.
        split: The images.
        transform: From an image to a normalised tensor.
        decode: The images' decoder.
        accelerator: Of the run; None for the ordinary loader.
        sampler: Of training images.
        begun: Whether a run that is resumed was begun with augmentation on the device; None for a new run. It goes on
            as it was begun, unless it is told otherwise.

    Raises:
        UserError: --data-on-device always, and it cannot be; an image that cannot be read.
    """
    if accelerator is None or config.data_on_device == 'never':
        return None
    if config.data_on_device == 'always':
        begun = None
    of_main: list[Decoded] = []
    try:
        if split.streamed:
            raise NotOnDevice('its images come from a stream')
        once, augment = to_device_steps(transform, decode.mode, accelerator.device)
        if augment.steps and begun is False:
            raise NotOnDevice('the run was begun so')
        source = Source(config, split, decode, once, augment, accelerator, bool(augment.steps and begun))
        reason = on_main_process(accelerator, lambda: _reason(lambda: of_main.append(source.read())))
    except NotOnDevice as e:
        reason = str(e)
    if reason and config.data_on_device == 'always':
        raise UserError(f'--data-on-device always: {split.name}: {reason}; leave it out')
    if reason and begun and sampler is not None:
        raise UserError(f'cannot resume: {split.name} was kept on the device, and now {reason}; mend that, or go on '
                        f'with other random augmentation by --data-on-device never')
    if reason:
        accelerator.print(f'data through the loader: {split.name}: {reason}', flush=True)
        return None
    decoded = of_main[0] if of_main else source.read()
    shape = ' x '.join(map(str, decoded.images.shape[1:]))
    accelerator.print(f'data on {accelerator.device.type}: {split.name}: {len(split):,} images of {shape}, '
                      f'{decoded.images.numel() / MIB:,.1f} MiB, {decoded.origin}', flush=True)
    return DeviceData(split, decoded, augment, accelerator.device, sampler, accelerator.is_main_process, decode)


def _reason(read: Callable[[], Any]) -> str:
    """Why a split cannot be kept on the device; '' when it has been read."""
    try:
        read()
    except NotOnDevice as e:
        return str(e)
    return ''


@dataclass
class Source:
    """What the images of a split on the device are made of.

    Args:
        config: The run's config.
        split: The images.
        decode: Their decoder.
        once: Steps of the transform that are the same in every epoch.
        augment: The others.
        accelerator: Of the run.
        begun: The run was begun with augmentation on the device, which it keeps.
    """
    config: TrainConfig
    split: Split
    decode: Decoder
    once: list[Any]
    augment: Augment
    accelerator: Accelerator
    begun: bool = False

    def read(self) -> Decoded:
        """The images, from the cache or decoded; the cache is written.

        Raises:
            NotOnDevice: They do not fit, or have several sizes.
            UserError: An image that cannot be read; a stale cache that is to be refused.
        """
        transform = transforms.Compose([*self.once, transforms.PILToTensor()])
        data = ImageData(self.split, transform, self.decode, 'mark' if self.config.skip_unreadable else 'raise')
        shape = _first_shape(data)
        if self.accelerator.is_main_process:  # it decides for all, of which each takes memory
            self._check(len(data), shape)
        cache = Cache.of(self.split, f'{self.decode} {transform}')
        if cache and (decoded := cache.read(shape, refuse=self.config.data_on_device == 'always')):
            return decoded
        decoded = decode_images(data, shape, self.config.workers, self.accelerator.is_main_process)
        if cache and self.accelerator.is_local_main_process and not decoded.unreadable.any():
            decoded.origin += cache.write(decoded)
        return decoded

    def _check(self, count: int, shape: tuple[int, ...]) -> None:
        device = self.accelerator.device
        needed, free, share = count * math.prod(shape), free_memory(device), 1. if self.begun else MEMORY_SHARE
        if needed > share * free:
            raise NotOnDevice(
                f'its {count:,} images of {" x ".join(map(str, shape))} take {needed / MIB:,.0f} MiB, more than '
                f'{share:.0%} of the {free / MIB:,.0f} MiB that are free')
        asked = self.begun or self.config.data_on_device == 'always'
        if (not asked and self.augment.steps and device.type == 'cpu'
                and max(*shape[1:], self.augment.side) > CPU_AUGMENTED_SIDE):
            raise NotOnDevice(f'on a CPU, images of more than {CPU_AUGMENTED_SIDE} pixels are augmented by workers')


def _first_shape(data: ImageData) -> tuple[int, ...]:
    """(C, H, W) of the first image that can be read."""
    for number in range(len(data)):
        image, _ = data[number, None]
        if not data.unreadable[number]:
            return tuple(image.shape)
    raise NotOnDevice('none of its images can be read')


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device and, since images are decoded there, on the CPU."""
    free = psutil.virtual_memory().available
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # 'max', or no such file
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    memory_of = getattr(getattr(torch, device.type, None), 'mem_get_info', None)
    return min(free, memory_of(device)[0]) if memory_of is not None else free


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode_images(data: ImageData, shape: tuple[int, ...], workers: int, show: bool) -> Decoded:
    """All images of a split as bytes.

    Args:
        data: Gives tensors of bytes.
        shape: (C, H, W) that all images must have.
        workers: Processes for it, fewer for few images.
        show: A progress bar.

    Raises:
        NotOnDevice: An image has another shape.
        UnreadableImage: Unless ``data`` marks these.
    """
    start = time.perf_counter()
    loader = DataLoader(
        data,
        batch_size=256,
        sampler=[(number, None) for number in range(len(data))],  # type: ignore[arg-type]
        num_workers=min(workers, len(data) // IMAGES_OF_A_WORKER),
        collate_fn=_collate,
        generator=torch.Generator(),
    )
    images, targets, done = torch.zeros(len(data), *shape, dtype=torch.uint8), [], 0
    with tqdm(total=len(data), desc=f'decode {data.split.name}', unit='image', leave=False,
              disable=None if show else True) as bar:
        for several, target in loader:
            for tensor in several:
                numbers = slice(done, done + len(tensor))
                if tensor.shape[1:] == shape:
                    images[numbers] = tensor
                elif not data.unreadable[numbers].all():
                    sizes = ' and '.join(f'{width} x {height}' for _, height, width in (shape, tensor.shape[1:]))
                    raise NotOnDevice(f'its images have several sizes, {sizes} among them')
                done += len(tensor)
            targets.append(target)
            bar.update(len(target))
    return Decoded(images, torch.cat(targets), data.unreadable.bool(),
                   f'decoded in {time.perf_counter() - start:.1f} s')


def _collate(samples: list[tuple]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Images as one tensor (B, C, H, W), or one each where they differ in size, and targets."""
    images, targets = zip(*samples)
    alike = len({image.shape for image in images}) == 1
    return [torch.stack(images)] if alike else [image[None] for image in images], torch.from_numpy(np.asarray(targets))


# ---- cache ----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of decoded images: in ``TIMM_SPINAL_CACHE``, or in timm_spinal in the user's cache."""
    own = os.environ.get('TIMM_SPINAL_CACHE')
    base = Path(own) if own else Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_spinal'
    return base.expanduser() / 'decoded'


@dataclass
class Cache:
    """The decoded images of a split on the disk.

    Args:
        path: The file.
        identity: What they were made from.
    """
    path: Path
    identity: str

    @classmethod
    def of(cls, split: Split, steps: str) -> 'Cache | None':
        """The cache of a split, or None where nothing says whether its images have changed.

        Args:
            split: The images.
            steps: How they are decoded.
        """
        try:
            content = hash_split(split, strict=True)
        except UserError:  # an image that is not there
            return None
        if content is None:
            return None
        place = os.path.realpath(split.name) if os.path.exists(split.name) else split.name
        indices = b'' if split.indices is None else np.ascontiguousarray(split.indices).tobytes()
        # of a data set that is made as its settings say, such as multimnist
        settings = [(k, v) for k, v in sorted(vars(split.dataset).items()) if isinstance(v, (int, str))]
        key = hashlib.sha256(f'{place}\n{steps}\n{settings}\n'.encode(errors='surrogateescape') + indices).hexdigest()
        name = re.sub(r'[^\w.-]+', '-', os.path.join(*Path(place).parts[-2:])).strip('-')[-80:]
        versions = f'Pillow {PIL.__version__}'
        return cls(cache_folder() / f'{name}-{key[:16]}.safetensors', f'{content} {versions}')

    def read(self, shape: tuple[int, ...], refuse: bool) -> Decoded | None:
        """The images; None where they are to be decoded.

        Raises:
            UserError: The cache is stale or damaged, and it is to be refused.
        """
        start = time.perf_counter()
        try:
            with safe_open(self.path, framework='pt') as file:
                metadata = file.metadata() or {}
                images, targets = file.get_tensor('images'), file.get_tensor('targets')
        except FileNotFoundError:
            return None
        except Exception as e:  # safetensors has errors of its own
            wrong = f'is damaged ({" ".join(str(e).split())[:100]})'
        else:
            wrong = ''
            if metadata.get('identity') != self.identity:
                wrong = 'is stale: the images, or the version of Pillow, have changed since'
            elif len(images) != len(targets) or images.shape[1:] != shape or _checksum(images) != metadata['checksum']:
                wrong = 'is damaged'
        if wrong and refuse:
            raise UserError(f'--data-on-device always: the cache {self.path} {wrong}; remove it, and it is made anew')
        if wrong:
            print(f'cache {self.path}: {wrong}; it is made anew', flush=True)
            return None
        unreadable = torch.zeros(len(images), dtype=torch.bool)
        return Decoded(images, targets, unreadable, f'from {self.path} in {time.perf_counter() - start:.1f} s')

    def write(self, decoded: Decoded) -> str:
        """Write the images; returns where they are, or why they are not, as the end of a line."""
        tensors = dict(images=decoded.images, targets=decoded.targets)
        metadata = dict(identity=self.identity, checksum=_checksum(decoded.images))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.path.parent).free < 1.1 * decoded.images.numel():
                return f', not cached: no space in {self.path.parent}'
            write_atomically(self.path, lambda temp: save_file(tensors, temp, metadata=metadata))
        except (OSError, UserError) as e:
            return f', not cached: {" ".join(str(e).split())}'
        return f', cached in {self.path}'


def _checksum(images: torch.Tensor) -> str:
    return f'{zlib.crc32(images.numpy()):08x}'  # type: ignore[arg-type]
