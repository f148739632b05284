"""Images to tensors: timm's transforms, with torchvision's rotation and perspective in front of them."""
from dataclasses import fields
from typing import Any, Callable

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import MaybeToTensor
from torch import nn
from torchvision import transforms

from timm_spinal.errors import UserError

from .config import InputOptions, TrainConfig, ValidateConfig
from .pixels import Decoder, usable_modes
from .policies import check_policy, mend_policies, try_out


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
    """What brings the images of any data set into the mode for a model with so many input channels; see `image_mode`.
    """
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
    first = []
    if config.perspective:
        first.append(transforms.RandomPerspective(p=config.perspective))
    if config.rotation:
        first.append(transforms.RandomRotation(config.rotation))
    if first and not config.no_aug:
        transform.transforms[:0] = first
    try_out(transform, image_mode(config, data['input_size'][0]), data['input_size'])
    return transform


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
        device = images.device
        return images.float().div_(255).sub_(self.mean.to(device)).div_(self.std.to(device))


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
