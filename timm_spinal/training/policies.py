"""Augmentation that runs to its end: timm's policies read strictly, mended for the installed Pillow, and tried out."""
import copy
import math
import re
from typing import Any, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment
from torchvision import transforms

from timm_spinal.errors import UserError

from .pixels import Decoder
from .sampling import preserved_rng, seed_rng

# sections of a policy's name as timm reads them, and the values that have a meaning (others: 0 or more)
_SECTIONS: dict[str, dict[str, type]] = {
    'rand': dict(m=int, n=int, p=float, mstd=float, mmax=int, inc=int, t=str),
    'augmix': dict(m=int, w=int, d=int, a=float, b=int, mstd=float),
    **dict.fromkeys(('original', 'originalr', 'v0', 'v0r', '3a'), dict(mstd=float)),
}
_BOUNDS = dict(n=(1, math.inf), w=(1, math.inf), mmax=(1, math.inf), a=(1e-6, math.inf), p=(0, 1), inc=(0, 1), b=(0, 1))
_PATTERNS = {int: r'\d+', float: r'\d+(\.\d*)?', str: 'weights|3aw|3a'}


def check_policy(text: str) -> None:
    """Refuse the name of a policy of which timm would pass over a part, or end in the middle of a run.

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
    found = re.fullmatch(f'{key}({_PATTERNS[kind]})', section)
    if found is None or kind is str:
        return found is not None
    low, high = _BOUNDS.get(key, (0, math.inf))
    return low <= float(found[1]) <= high


def operations(step: Any) -> Iterator[Any]:
    """The operations of one of timm's policies."""
    if isinstance(step, auto_augment.AutoAugment):
        for part in step.policy:
            yield from part
    elif isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
        yield from step.ops


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm's. No bits at all make a black image, which Pillow gave up to release 12 and refuses since."""
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
        raise UserError(f'augmentation: gives {got} for images of mode {mode}, the model takes {size}; leave some out')


def _run(step: Any, name: str, image: Any, mode: str) -> Any:
    if isinstance(step, transforms.RandomApply):
        for part in step.transforms:
            image = _run(part, type(part).__name__, image, mode)
        return image
    try:
        return _certain(step)(image)
    except Exception as e:  # whatever stands in for an image or a setting that the step is not made for
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(f'augmentation: {name} fails on images of mode {mode} ({reason}); leave it out, or change its '
                        f'settings, --train-interpolation or --input-img-mode') from e


def _certain(step: Any) -> Any:
    """A step that is done with some probability, as one that is always done."""
    step = copy.copy(step)
    for name in ('p', 'prob', 'probability'):
        if isinstance(getattr(step, name, None), float):
            setattr(step, name, 1.)
    return step
