"""Augmentation of whole batches on the device, with parameters that are drawn for an epoch at its start.

`to_device_steps` turns a training transform of timm and torchvision into steps of this file. A step has the
distribution of the transform that it stands for, and computes what Pillow computes, on floats that hold the levels
0 .. 255. Images are warped and blurred by kornia. Crops without resizing and flips are plain indexing. Resizing is a
product with matrices of Pillow's weights: kornia's resized crops do not average over the pixels that they shrink, and
have one interpolation and one order of colour changes for a batch, where every image has its own here.
"""
import importlib.util
import math
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision import transforms

from .transforms import BatchNormalize

Size = tuple[int, int]  # height and width
Drawn = dict[str, torch.Tensor]


class NotOnDevice(Exception):
    """Why images cannot be augmented, or kept, on the device."""


class Draws:
    """Random numbers of a step in an epoch: a row for each position, the same whatever the number of positions.

    Args:
        count: Positions.
        entropy: Seed, epoch and number of the step.
    """

    def __init__(self, count: int, *entropy: int):
        self.count, self.entropy, self.calls = count, entropy, 0

    def uniform(self, low: float = 0., high: float = 1., *shape: int) -> torch.Tensor:
        """Uniform numbers in [low, high), (count, *shape), float64."""
        self.calls += 1
        seed = int(np.random.SeedSequence([*self.entropy, self.calls]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        return low + (high - low) * torch.rand(self.count, *shape, generator=generator, dtype=torch.float64)

    def integers(self, low: int, high: Any, *shape: int) -> torch.Tensor:
        """Whole numbers from low to high, both included, (count, *shape) or as ``high`` is broadcast to it."""
        return (low + (high - low + 1) * self.uniform(0., 1., *shape)).floor().long()

    def happens(self, probability: float) -> torch.Tensor:
        """(count,) of bool."""
        return self.uniform() < probability


class Step:
    """A random change of images. As it stands it changes nothing."""
    needs_kornia = False

    def new_size(self, size: Size) -> Size:
        """Size of the images that come out, of those that go in."""
        return size

    def draw(self, draws: Draws, size: Size) -> Drawn:
        """Parameters for all positions of an epoch, each (positions, ...), on the CPU.

        Args:
            draws: Gives the random numbers.
            size: Of the images that go in.
        """
        return {}

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """Change a batch (B, C, H, W) by its parameters (B, ...)."""
        raise NotImplementedError


# ---- crops and flips ------------------------------------------------------------------------------------------------


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    x = x.clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


# Pillow's filters of the distance between pixels; each ends in 0
FILTERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'bilinear': lambda x: (1 - x).clamp_(min=0),
    'bicubic': _bicubic,
    'lanczos': lambda x: torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), 0.),
    'hamming': lambda x: torch.where(x < 1, torch.sinc(x) * (0.54 + 0.46 * (math.pi * x).cos()), 0.),
}


def resample_matrix(
        start: torch.Tensor,
        length: torch.Tensor,
        source: int,
        target: int,
        kinds: list[str],
        kind: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pillow's weights of resizing a part of each row of pixels, (B, target, source).

    Args:
        start: First pixel of the part, (B,).
        length: Pixels of the part, (B,).
        source: Pixels of the row.
        target: Pixels to come out.
        kinds: Of `FILTERS`.
        kind: Number of the filter in ``kinds``, (B,); the first when not given.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / target
    centre = (torch.arange(target, device=start.device)[:, None] + 0.5) * scale
    place = torch.arange(source, device=start.device) - start
    distance = (place + 0.5 - centre).div_(scale.clamp(min=1)).abs_()
    weights = FILTERS[kinds[0]](distance)
    for number, name in enumerate(kinds[1:], 1):
        assert kind is not None
        weights = torch.where((kind == number)[:, None, None], FILTERS[name](distance), weights)
    weights *= (place >= 0) & (place < length)
    return weights.div_(weights.sum(-1, keepdim=True))


class ResizedCrop(Step):
    """`RandomResizedCropAndInterpolation` of timm."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.size, self.scale, self.ratio = crop.size, crop.scale, crop.ratio
        modes = crop.interpolation if isinstance(crop.interpolation, (tuple, list)) else [crop.interpolation]
        self.kinds = _known_filters(modes)

    def new_size(self, size: Size) -> Size:
        return self.size

    def draw(self, draws: Draws, size: Size, tries: int = 10) -> Drawn:
        height, width = size
        area = draws.uniform(*self.scale, tries) * height * width
        ratio = draws.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), tries).exp()
        wide, high = (area * ratio).sqrt().round().clamp(min=1), (area / ratio).sqrt().round().clamp(min=1)
        fits = (wide <= width) & (high <= height)
        first = fits.int().argmax(1, keepdim=True)
        wide, high = wide.gather(1, first)[:, 0], high.gather(1, first)[:, 0]
        top, left = draws.integers(0, height - high), draws.integers(0, width - wide)
        drawn = dict(top=top, left=left, high=high.long(), wide=wide.long())
        for name, value in _central_crop(size, self.ratio).items():  # for images that no crop fits
            drawn[name] = torch.where(fits.any(1), drawn[name], value)
        return dict(drawn, kind=draws.integers(0, len(self.kinds) - 1))

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        rows, columns = (
            resample_matrix(drawn[start], drawn[length], images.shape[dim], self.size[dim], self.kinds, drawn['kind'])
            for start, length, dim in (('top', 'high', -2), ('left', 'wide', -1)))
        return _resample(images, rows, columns)


class Resize(Step):
    """`torchvision.transforms.Resize` to a height and width."""

    def __init__(self, resize: transforms.Resize):
        if isinstance(resize.size, int) or len(resize.size) != 2:
            raise NotOnDevice('a resizing by one side has no step on the device')
        self.size: Size = tuple(resize.size)
        self.kinds = _known_filters([resize.interpolation])

    def new_size(self, size: Size) -> Size:
        return self.size

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        if tuple(images.shape[-2:]) == self.size:
            return images
        start = torch.zeros(1, device=images.device)
        rows, columns = (
            resample_matrix(start, start + images.shape[dim], images.shape[dim], self.size[dim], self.kinds)
            for dim in (-2, -1))
        return _resample(images, rows.expand(len(images), -1, -1), columns.expand(len(images), -1, -1))


def _known_filters(modes: Any) -> list[str]:
    kinds = [mode.value for mode in modes]
    for kind in kinds:
        if kind not in FILTERS:
            raise NotOnDevice(f'--train-interpolation {kind} has no step on the device')
    return kinds


def _central_crop(size: Size, ratio: tuple[float, float]) -> dict[str, int]:
    height, width = high, wide = size
    if width / height < min(ratio):
        high = round(wide / min(ratio))
    elif width / height > max(ratio):
        wide = round(high * max(ratio))
    return dict(top=(height - high) // 2, left=(width - wide) // 2, high=high, wide=wide)


def _resample(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Resize by matrices of weights, (B, height, H) and (B, width, W): along the rows first, as Pillow does."""
    wide = images.float().flatten(1, 2) @ columns.transpose(1, 2)
    wide = _levels(wide.add_(0.5)).unflatten(1, images.shape[1:3])
    return _levels((rows[:, None] @ wide).add_(0.5))


def _levels(images: torch.Tensor) -> torch.Tensor:
    """Whole levels, from 0 to 255; fractions are cut off."""
    return images.clamp_(0, 255).floor_()


class PadCrop(Step):
    """`torchvision.transforms.RandomCrop` with black padding."""

    def __init__(self, crop: transforms.RandomCrop):
        self.size: Size = tuple(crop.size)
        self.padding = int(crop.padding or 0)

    def new_size(self, size: Size) -> Size:
        return self.size

    def draw(self, draws: Draws, size: Size) -> Drawn:
        most = [have + 2 * self.padding - want for have, want in zip(size, self.size)]
        return dict(top=draws.integers(0, most[0]), left=draws.integers(0, most[1]))

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        padded = F.pad(images, [self.padding] * 4)
        windows = padded.unfold(2, self.size[0], 1).unfold(3, self.size[1], 1)
        return windows[torch.arange(len(images), device=images.device), :, drawn['top'], drawn['left']]


class Flip(Step):
    """`RandomHorizontalFlip` (dim -1) and `RandomVerticalFlip` (dim -2) of torchvision."""

    def __init__(self, flip: Any, dim: int):
        self.p, self.dim = flip.p, dim

    def draw(self, draws: Draws, size: Size) -> Drawn:
        return dict(flip=draws.happens(self.p))

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        return torch.where(_per_image(drawn['flip']), images.flip(self.dim), images)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values[:, None, None, None]


# ---- rotation and perspective ---------------------------------------------------------------------------------------


class Warp(Step):
    """A step that looks up each pixel elsewhere in the image, at a place that a matrix gives.

    `draw` gives ``warp``, (positions, 3, 3): from the place of a pixel that comes out to the place where it is looked
    up, both from -1 to 1 between the centres of the first and the last pixel of a side.
    """
    needs_kornia = True
    mode = 'nearest'

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        from kornia.geometry.transform import homography_warp
        size, warp = (images.shape[-2], images.shape[-1]), drawn['warp']
        images = images.float()
        if self.mode == 'nearest':
            return homography_warp(images, warp, size, mode='nearest', padding_mode='zeros', align_corners=True)
        # Pillow takes the pixels at the border for what lies half a pixel beyond, and black for what lies further
        warped = homography_warp(images, warp, size, mode=self.mode, padding_mode='border', align_corners=True)
        inside = homography_warp(torch.ones_like(images[:, :1]), warp, size, mode='nearest', padding_mode='zeros',
                                 align_corners=True)
        return _levels(warped * inside + 1e-3)


def _between_centres(matrices: torch.Tensor, size: Size) -> torch.Tensor:
    """Matrices from pixels to pixels, counted from the edge of the image, as `Warp` takes them."""
    height, width = size
    scale = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1), 1.], dtype=matrices.dtype)
    to_unit = torch.diag(scale)
    to_unit[:2, 2] = -1 - 0.5 * scale[:2]  # the centre of the first pixel lies at 0.5
    return (to_unit @ matrices @ torch.linalg.inv(to_unit)).float()


class Rotation(Warp):
    """`torchvision.transforms.RandomRotation` with its defaults: about the centre, to the nearest pixel, on black."""

    def __init__(self, rotation: transforms.RandomRotation):
        self.degrees = rotation.degrees

    def draw(self, draws: Draws, size: Size) -> Drawn:
        angle = draws.uniform(*self.degrees)
        cos, sin = torch.deg2rad(-angle).cos(), torch.deg2rad(-angle).sin()
        y, x = size[0] / 2, size[1] / 2
        zero, one = torch.zeros_like(angle), torch.ones_like(angle)
        rows = [(cos, sin, x - cos * x - sin * y), (-sin, cos, y + sin * x - cos * y), (zero, zero, one)]
        matrices = torch.stack([torch.stack(row, -1) for row in rows], -2)
        return dict(angle=angle.float(), warp=_between_centres(matrices, size))


class Perspective(Warp):
    """`torchvision.transforms.RandomPerspective` with its defaults: bilinear, on black."""
    mode = 'bilinear'

    def __init__(self, perspective: transforms.RandomPerspective):
        self.p, self.distortion = perspective.p, perspective.distortion_scale

    def draw(self, draws: Draws, size: Size) -> Drawn:
        from kornia.geometry.transform import get_perspective_transform
        height, width = size
        most = [int(self.distortion * (side // 2)) for side in (width, height)]
        start = torch.tensor([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], dtype=torch.float64)
        inward = torch.stack([draws.integers(0, limit, 4) for limit in most], -1)  # of each corner, (count, 4, 2)
        end = start + inward * torch.where(start > 0, -1, 1)
        matrices = get_perspective_transform(end, start.expand_as(end))
        return dict(apply=draws.happens(self.p), ends=end.float(), warp=_between_centres(matrices, size))

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        return torch.where(_per_image(drawn['apply']), super().__call__(images, drawn), images)


# ---- colours --------------------------------------------------------------------------------------------------------


def grey(images: torch.Tensor) -> torch.Tensor:
    """Grey levels (B, 1, H, W) of images of one or three channels, as Pillow rounds them."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    return (red * (19595 / 65536) + green * (38470 / 65536) + blue * (7471 / 65536) + 0.5).floor_()


class ColorJitter(Step):
    """`torchvision.transforms.ColorJitter` without hue: brightness, contrast and saturation in an order of each image.

    Each of them blends an image with another: black, its mean grey, or itself in grey.
    """

    def __init__(self, jitter: transforms.ColorJitter, p: float = 1.):
        if jitter.hue is not None:
            raise NotOnDevice('a change of hue has no step on the device')
        self.ranges = [bounds or (1., 1.) for bounds in (jitter.brightness, jitter.contrast, jitter.saturation)]
        self.p = p

    def draw(self, draws: Draws, size: Size) -> Drawn:
        factors = torch.stack([draws.uniform(*bounds) for bounds in self.ranges], -1).float()
        factors = torch.where(draws.happens(self.p)[:, None], factors, 1.)
        return dict(factors=factors, order=draws.uniform(0., 1., 3).argsort(-1))

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        images = images.float()
        for change in drawn['order'].unbind(1):
            factor = _per_image(drawn['factors'].gather(1, change[:, None])[:, 0])
            shades = grey(images)
            mean = (shades.mean((1, 2, 3), keepdim=True) + 0.5).floor_()
            other = _per_image(change == 1) * mean + _per_image(change == 2) * shades
            images = _levels(other + factor * (images - other))
        return images


class Grayscale(Step):
    """`torchvision.transforms.RandomGrayscale`."""

    def __init__(self, grayscale: transforms.RandomGrayscale):
        self.p = grayscale.p

    def draw(self, draws: Draws, size: Size) -> Drawn:
        return dict(apply=draws.happens(self.p))

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        images = images.float()
        return torch.where(_per_image(drawn['apply']), grey(images), images)


class Blur(Step):
    """`torchvision.transforms.GaussianBlur`, with a probability."""
    needs_kornia = True

    def __init__(self, blur: transforms.GaussianBlur, p: float = 1.):
        self.kernel, self.sigma, self.p = blur.kernel_size, blur.sigma, p

    def draw(self, draws: Draws, size: Size) -> Drawn:
        return dict(apply=draws.happens(self.p), sigma=draws.uniform(*self.sigma).float())

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        from kornia.filters import filter2d_separable  # gaussian_blur2d looks at sigma, for which the host would wait
        images = images.float()
        across, down = (self._weights(drawn['sigma'], length) for length in self.kernel)
        blurred = filter2d_separable(images, across, down).round_()
        return torch.where(_per_image(drawn['apply']), blurred, images)

    @staticmethod
    def _weights(sigma: torch.Tensor, length: int) -> torch.Tensor:
        distance = torch.arange(length, device=sigma.device) - (length - 1) / 2
        return (-0.5 * (distance / sigma[:, None]).square()).softmax(-1)


# ---- erasing --------------------------------------------------------------------------------------------------------


class Erase(Step):
    """`RandomErasing` of timm, on normalised images.

    The noise of ``pixel`` is a part of one long row of normal numbers, at a place that is drawn for each image.
    """
    offsets = 2 ** 20

    def __init__(self, erasing: RandomErasing):
        self.erasing = erasing
        self._noise = torch.empty(0)

    def draw(self, draws: Draws, size: Size, tries: int = 10) -> Drawn:
        own, (height, width) = self.erasing, size
        count = draws.integers(own.min_count, own.max_count)
        boxes = []
        for number in range(own.max_count):
            area = draws.uniform(own.min_area, own.max_area, tries) * height * width / count[:, None]
            ratio = draws.uniform(*own.log_aspect_ratio, tries).exp()
            high, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
            fits = (wide < width) & (high < height)
            first = fits.int().argmax(1, keepdim=True)
            high, wide = high.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
            top, left = draws.integers(0, height - high), draws.integers(0, width - wide)
            high = torch.where(fits.any(1) & (number < count), high, 0)
            boxes.append(torch.stack([top, left, top + high.long(), left + wide.long()], -1))
        drawn = dict(apply=draws.happens(own.probability), boxes=torch.stack(boxes, 1))
        if own.per_pixel:
            drawn['offset'] = draws.integers(0, self.offsets - 1)
        elif own.rand_color:
            drawn['color'] = torch.special.ndtri(draws.uniform(0., 1., own.max_count, 3)).float()
        return drawn

    def __call__(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        _, channels, height, width = images.shape
        y = torch.arange(height, device=images.device)[:, None]
        x = torch.arange(width, device=images.device)
        filling: Any = self._pixels(images, drawn['offset']) if 'offset' in drawn else 0.
        for number, box in enumerate(drawn['boxes'].unbind(1)):
            top, left, bottom, right = (_per_image(side) for side in box.unbind(1))
            inside = (y >= top) & (y < bottom) & (x >= left) & (x < right) & _per_image(drawn['apply'])
            if 'color' in drawn:
                filling = drawn['color'][:, number, :channels, None, None]
            images = torch.where(inside, filling, images)
        return images

    def _pixels(self, images: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        length = images[0].numel()
        if self._noise.numel() < self.offsets + length or self._noise.device != images.device:
            row = torch.randn(self.offsets + length, generator=torch.Generator().manual_seed(0))
            self._noise = row.to(images.device)
        return self._noise.unfold(0, length, 1)[offset].view_as(images)


# ---- from a transform to steps --------------------------------------------------------------------------------------


# those that draw nothing, unless they are told to
FIXED = (transforms.Resize, transforms.CenterCrop, ResizeKeepRatio, CenterCropOrPad)
STEPS: dict[type, Callable[..., Step]] = {
    RandomResizedCropAndInterpolation: ResizedCrop,
    transforms.Resize: Resize,
    transforms.RandomCrop: PadCrop,
    transforms.RandomHorizontalFlip: lambda flip: Flip(flip, -1),
    transforms.RandomVerticalFlip: lambda flip: Flip(flip, -2),
    transforms.RandomRotation: Rotation,
    transforms.RandomPerspective: Perspective,
    transforms.ColorJitter: ColorJitter,
    transforms.RandomGrayscale: Grayscale,
    transforms.GaussianBlur: Blur,
    RandomErasing: Erase,
}


class Augment:
    """The random steps of a transform, and the conversion to floats between them.

    Args:
        before: Steps on levels 0 .. 255.
        finish: From levels to normalised floats.
        after: Steps on normalised floats.
    """

    def __init__(self, before: list[Step], finish: Callable[[torch.Tensor], torch.Tensor], after: list[Step]):
        self.before, self.finish, self.after = before, finish, after

    @property
    def steps(self) -> list[Step]:
        return [*self.before, *self.after]

    @property
    def side(self) -> int:
        """The longer side of the images that come out, 0 where it is that of those that go in."""
        return max([0, *(max(step.new_size((0, 0))) for step in self.steps)])

    def draw(self, count: int, size: Size, seed: int, epoch: int) -> list[Drawn]:
        """Parameters of an epoch, for each step.

        Args:
            count: Images of the epoch.
            size: Height and width of the images that go in.
            seed: Of the run.
            epoch: Number of the epoch.
        """
        drawn = []
        for number, step in enumerate(self.steps, 1):
            drawn.append(step.draw(Draws(count, seed, epoch, number), size))
            size = step.new_size(size)
        return drawn

    def __call__(self, images: torch.Tensor, drawn: list[Drawn]) -> torch.Tensor:
        """Bytes (B, C, H, W) and the parameters of these images to normalised floats."""
        for step, own in zip(self.before, drawn):
            images = step(images, own)
        images = self.finish(images)
        for step, own in zip(self.after, drawn[len(self.before):]):
            images = step(images, own)
        return images


def to_device_steps(transform: Any, mode: str, device: torch.device) -> tuple[list[Any], Augment]:
    """A transform in two: what is done to an image once, and what the device does to batches in every epoch.

    Args:
        transform: A `Compose` from an image to a normalised tensor.
        mode: Mode of the images.
        device: Of the batches.

    Raises:
        NotOnDevice: A step that there is not on the device, or kornia is missing for one.
    """
    steps = list(getattr(transform, 'transforms', []))
    to_tensor = [i for i, step in enumerate(steps) if isinstance(step, (MaybeToTensor, transforms.ToTensor))]
    if len(to_tensor) != 1 or not isinstance(steps[to_tensor[0] + 1], transforms.Normalize):
        raise NotOnDevice('its transform does not end in tensors that are normalised')
    normalize = steps[to_tensor[0] + 1]
    finish = BatchNormalize(*(torch.as_tensor(values).to(device) for values in (normalize.mean, normalize.std)))
    once = next(i for i, step in enumerate(steps) if not _is_fixed(step))
    before, after = ([_step(step) for step in part] for part in (steps[once:to_tensor[0]], steps[to_tensor[0] + 2:]))
    if (before or after) and mode not in ('L', 'RGB'):
        raise NotOnDevice(f'images of mode {mode} are not augmented on the device')
    lacking = [type(step).__name__ for step in (*before, *after) if step.needs_kornia]
    if lacking and importlib.util.find_spec('kornia') is None:
        raise NotOnDevice(f"{' and '.join(lacking)} on the device needs kornia; pip install 'timm-spinal[device]'")
    return steps[:once], Augment(before, finish, after)


def _is_fixed(step: Any) -> bool:
    return isinstance(step, FIXED) and not any(
        getattr(step, name, 0) for name in ('random_scale_prob', 'random_aspect_prob'))


def _step(step: Any) -> Step:
    if isinstance(step, transforms.RandomApply) and len(step.transforms) == 1:
        inner, options = step.transforms[0], dict(p=step.p)
    else:
        inner, options = step, {}
    if type(inner) not in STEPS:
        raise NotOnDevice(f'{type(inner).__name__} has no step on the device')
    return STEPS[type(inner)](inner, **options)
