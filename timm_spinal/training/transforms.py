"""Images to tensors: timm's transforms, with torchvision's rotation and perspective in front of them.

timm's policies of augmentation are read strictly, mended for the installed Pillow, and tried out before a run starts.
"""
import contextlib
import copy
import math
import random
import re
from dataclasses import fields
from typing import Any, Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform, resolve_data_config
from timm.data.transforms import MaybeToTensor
from torch import nn
from torchvision import transforms

from timm_spinal.errors import UserError

from .config import InputOptions, TrainConfig, ValidateConfig
from .pixels import Decoder, usable_modes


def resolve_data(config: TrainConfig | ValidateConfig, model: nn.Module) -> dict[str, Any]:
    """timm's data config (input_size, mean, std, interpolation, crop_pct, crop_mode) for a model.

    As `timm.data.resolve_data_config`, except that the number of channels is the model's own, and a mean or std for
    another number of channels is averaged: a model made with ``in_chans=1`` takes grey images.

    Raises:
        UserError: --mean, --std or --input-size that do not fit the model's channels, a --std of 0, an unknown
            --interpolation.
    """
    given = {k: v for k, v in vars(config).items() if k in _DATA_KEYS and v not in (None, '')}
    channels = getattr(model, 'in_chans', None) or given.get('in_chans') or 3
    if given.pop('in_chans', channels) != channels or given.get('input_size', [channels])[0] != channels:
        raise UserError(f'input channels: the model takes {channels}; give --in-chans and --input-size that agree')
    for key in ('mean', 'std'):
        if len(given.get(key, [0])) not in (1, channels):
            raise UserError(f'--{key}: {len(given[key])} values for {channels} channels; give 1 or {channels}')
    if min(given.get('std', [1])) <= 0:
        raise UserError(f'--std {min(given["std"]):g}: pixels are divided by it; give numbers above 0')
    data = resolve_data_config({**given, 'in_chans': channels}, model=model)
    if data['interpolation'] not in INTERPOLATIONS:
        raise UserError(f'--interpolation {data["interpolation"]}: unknown; use {", ".join(INTERPOLATIONS)}')
    data['input_size'] = (channels, *data['input_size'][1:])
    for key in ('mean', 'std'):
        if len(data[key]) != channels:
            data[key] = (sum(data[key]) / len(data[key]),) * channels
    return data


# those that timm knows: torchvision's without the ones that Pillow does not have, and the other way round
INTERPOLATIONS = tuple(m.value for m in transforms.InterpolationMode if hasattr(Image.Resampling, m.name))
_DATA_KEYS = {f.name for f in fields(InputOptions)}  # what timm's resolve_data_config takes


def image_mode(config: TrainConfig | ValidateConfig, channels: int) -> str:
    """PIL mode of the images for a model with so many input channels.

    Raises:
        UserError: Neither 1 nor 3 channels and no --input-img-mode; or one that Pillow does not have, that has not
            8 bits a channel, or that has other channels.
    """
    mode, modes = config.input_img_mode or {1: 'L', 3: 'RGB'}.get(channels, ''), usable_modes()
    fitting = ', '.join(name for name in modes if modes[name] == channels)
    advice = f'use one of {fitting}' if fitting else 'none has so many; change --in-chans'
    if not mode:
        raise UserError(f'input channels: {channels}, for which --input-img-mode has no default; {advice}')
    if mode not in modes:
        raise UserError(f'--input-img-mode {mode}: is not a mode of Pillow with 8 bits a channel; for a model '
                        f'with {channels} input channels {advice}')
    if modes[mode] != channels:
        raise UserError(f'--input-img-mode {mode}: has {modes[mode]} channel(s), the model takes {channels}; {advice}')
    return mode


def create_decoder(config: TrainConfig | ValidateConfig, channels: int) -> Decoder:
    """The decoder to the mode of images for a model with so many input channels; see `image_mode`."""
    return Decoder(image_mode(config, channels), config.exif_transpose)


def train_transform(config: TrainConfig, data: dict[str, Any]) -> Callable:
    """Training transform; --rotation and --perspective come first, on the whole image, as in the MNIST recipes.

    Raises:
        UserError: An --aa policy or interpolation that timm does not know, or a step that does not go with the mode of
            the images or with another setting.
    """
    if config.train_interpolation not in ('', 'random', *INTERPOLATIONS):
        raise UserError(f'augmentation: --train-interpolation {config.train_interpolation}: unknown; use random, '
                        f'{", ".join(INTERPOLATIONS)}')
    if config.aa:
        check_policy(config.aa)
    interpolation = data['interpolation'] if config.no_aug else config.train_interpolation or data['interpolation']
    options: dict[str, Any] = dict(
        input_size=data['input_size'],
        is_training=True,
        no_aug=config.no_aug,
        train_crop_mode=config.train_crop_mode,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter or None,
        color_jitter_prob=config.color_jitter_prob,
        grayscale_prob=config.grayscale_prob,
        gaussian_blur_prob=config.gaussian_blur_prob,
        auto_augment=config.aa or None,
        interpolation=interpolation,
        mean=data['mean'],
        std=data['std'],
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
    )
    try:
        transform = create_transform(**options)
    except (AssertionError, KeyError, ValueError) as e:
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise UserError(f'augmentation: timm refuses a setting ({reason}); see --help') from e
    mend_policies(transform)
    if config.pad_crop is not None and not config.no_aug:
        transform.transforms[:1] = _pad_crop(config, data)
    first = []
    if config.perspective:
        first.append(transforms.RandomPerspective(p=config.perspective))
    if config.rotation:
        first.append(transforms.RandomRotation(config.rotation))
    if first and not config.no_aug:
        transform.transforms[:0] = first
    try_out(transform, image_mode(config, data['input_size'][0]), data['input_size'])
    return transform


def _pad_crop(config: TrainConfig, data: dict[str, Any]) -> list[Callable]:
    """Resize to the input size, if need be, pad, and crop the input size at random."""
    if config.train_crop_mode:
        raise UserError(f'augmentation: --pad-crop {config.pad_crop}: is a random crop, and so is --train-crop-mode '
                        f'{config.train_crop_mode}; leave one of them out')
    given, size = config.train_interpolation, data['input_size'][1:]
    mode = data['interpolation'] if given in ('', 'random') else given
    return [transforms.Resize(size, transforms.InterpolationMode(mode)), transforms.RandomCrop(size, config.pad_crop)]


def eval_transform(data: dict[str, Any]) -> Callable:
    """Evaluation transform: resize, centre crop, normalise."""
    return create_transform(
        data['input_size'],
        is_training=False,
        interpolation=data['interpolation'],
        mean=data['mean'],
        std=data['std'],
        crop_pct=data['crop_pct'],
        crop_mode=data['crop_mode'],
    )


def ten_crop_transform(data: dict[str, Any]) -> Callable:
    """Resize as for evaluation, then the four corners, the centre and their mirror images: (10, C, H, W).

    Raises:
        UserError: Crop mode border, which leaves images that are smaller than a crop.
    """
    if data['crop_mode'] == 'border':
        raise UserError('--crops 10: images of --crop-mode border are smaller than a crop; use center or squash')
    *resize, _, to_tensor, normalize = eval_transform(data).transforms  # type: ignore[attr-defined]
    crop = transforms.TenCrop(data['input_size'][1:])
    return transforms.Compose([*resize, crop, StackCrops(to_tensor), normalize])


class StackCrops:
    """Several images as one tensor (N, C, H, W)."""

    def __init__(self, to_tensor: Callable[[Any], torch.Tensor]):
        self.to_tensor = to_tensor

    def __call__(self, images: Any) -> torch.Tensor:
        return torch.stack([self.to_tensor(image) for image in images])


class BatchNormalize:
    """Bytes (B, C, H, W) to normalised floats, the same to the bit as ToTensor and Normalize of each image."""

    def __init__(self, mean: Any, std: Any):
        self.mean = torch.as_tensor(mean).view(-1, 1, 1)
        self.std = torch.as_tensor(std).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.mean.device != images.device:  # once: a copy to a device may wait for it
            self.mean, self.std = (x.to(images.device, non_blocking=True) for x in (self.mean, self.std))
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def split_transform(transform: Callable) -> tuple[Callable, Callable[[torch.Tensor], torch.Tensor]]:
    """A transform in two: an image to bytes, and whole batches of bytes to floats.

    Conversion to floats is most of what loading costs next to decoding. A transform that does more with floats than to
    normalise them stays in one piece, with an identity behind it.
    """
    steps = list(getattr(transform, 'transforms', []))
    if not (len(steps) > 1 and isinstance(steps[-1], transforms.Normalize)
            and isinstance(steps[-2], (MaybeToTensor, transforms.ToTensor))):
        return transform, nn.Identity()
    begin = transforms.Compose([*steps[:-2], transforms.PILToTensor()])
    return begin, BatchNormalize(steps[-1].mean, steps[-1].std)


# ---- policies of augmentation ---------------------------------------------------------------------------------------


# sections of a policy's name as timm reads them, and the values that have a meaning (others: 0 or more)
_SECTIONS: dict[str, dict[str, type]] = {
    'rand': dict(m=int, n=int, p=float, mstd=float, mmax=int, inc=int, t=str),
    'augmix': dict(m=int, w=int, d=int, a=float, b=int, mstd=float),
    **dict.fromkeys(('original', 'originalr', 'v0', 'v0r', '3a'), dict(mstd=float)),
}
_BOUNDS = dict(n=(1, math.inf), w=(1, math.inf), mmax=(1, math.inf), a=(1e-6, math.inf), p=(0, 1), inc=(0, 1), b=(0, 1))
_PATTERNS = {int: r'\d+', float: r'\d+(\.\d*)?', str: 'weights|3aw|3a'}


def check_policy(text: str) -> None:
    """Refuse the name of a policy of which timm would ignore a part, or which would fail in the middle of a run.

    Raises:
        UserError: Names the part.
    """
    name, *sections = text.split('-')
    if name not in _SECTIONS:
        raise UserError(f'augmentation: --aa {text}: unknown policy {name!r}; use {", ".join(_SECTIONS)}')
    known = _SECTIONS[name]
    keys = [next((key for key in known if _is_section(key, known[key], section)), None) for section in sections]
    for key, section in zip(keys, sections):
        if key is None or keys.count(key) > 1:
            wrong = f'-{key} comes twice' if key else f'{section!r} is not understood'
            takes = ', '.join('-tweights, -t3aw, -t3a' if kind is str else f'-{k}NUMBER' for k, kind in known.items())
            raise UserError(f'augmentation: --aa {text}: {wrong}; {name} takes {takes}')


def _is_section(key: str, kind: type, section: str) -> bool:
    match = re.fullmatch(f'{key}({_PATTERNS[kind]})', section)
    if match is None or kind is str:
        return match is not None
    low, high = _BOUNDS.get(key, (0, math.inf))
    return low <= float(match[1]) <= high


def operations(step: Any) -> Iterator[Any]:
    """The operations of one of timm's policies."""
    if isinstance(step, auto_augment.AutoAugment):
        for part in step.policy:
            yield from part
    elif isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
        yield from step.ops


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm's, also for 0 bits: that is a black image, for which Pillow raises an error from release 12 on."""
    if bits_to_keep >= 8:
        return image
    kept = ImageOps.posterize(image, max(bits_to_keep, 1))
    return kept if bits_to_keep >= 1 else kept.point(lambda _: 0)


def mend_policies(transform: Any) -> None:
    """Give the policies of a transform our `posterize`."""
    for step in transform.transforms:
        for operation in operations(step):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize


def try_out(transform: Any, mode: str, size: tuple[int, ...]) -> None:
    """Run every step of a training transform, and every operation of its policy, on one image of noise.

    Args:
        transform: A `Compose` from image to tensor.
        mode: Mode of the images.
        size: (C, H, W) of the tensor.

    Raises:
        UserError: A step that does not go with the mode or with another setting, by its name.
    """
    _, height, width = size
    noise = np.random.default_rng(0).integers(0, 256, (height + 8, width + 16, 3), dtype=np.uint8)
    image: Any = Decoder(mode)(Image.fromarray(noise), lambda: 'of noise')
    with preserved_rng():
        seed_rng(0)
        for step in transform.transforms:
            for part in {operation.name: operation for operation in operations(step)}.values():
                _run(part, f'{part.name} of {type(step).__name__}', image, mode)
            image = _run(step, type(step).__name__, image, mode)
    if not isinstance(image, torch.Tensor) or image.shape != size:
        got = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise UserError(f'augmentation: makes {got} of images of mode {mode}, but the model takes {size}; leave '
                        f'some of it out')


def _run(step: Any, name: str, image: Any, mode: str) -> Any:
    if isinstance(step, transforms.RandomApply):
        for part in step.transforms:
            image = _run(part, type(part).__name__, image, mode)
        return image
    try:
        return _always(step)(image)
    except Exception as e:  # steps raise all kinds of errors for modes and settings that they do not support
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(f'augmentation: {name} fails on images of mode {mode} ({reason}); leave it out, or change its '
                        f'settings, --train-interpolation or --input-img-mode') from e


def _always(step: Any) -> Any:
    """A copy of a step with probability 1."""
    step = copy.copy(step)
    for name in ('p', 'prob', 'probability'):
        if isinstance(getattr(step, name, None), float):
            setattr(step, name, 1.)
    return step


# ---- random numbers of transforms -----------------------------------------------------------------------------------


def seed_rng(seed: int) -> None:
    """Seed the three global generators of the CPU; ``seed`` is below 2^32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also seeds every accelerator


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the three global generators of the CPU back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
