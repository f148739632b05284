"""Augmentation on the device computes what Pillow computes, from parameters with the ordinary distributions."""
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms as tv

from timm_spinal.training import device_augment
from timm_spinal.training.device_augment import (
    FILTERS,
    Blur,
    ColorJitter,
    Draws,
    Erase,
    Flip,
    Grayscale,
    NotOnDevice,
    PadCrop,
    Perspective,
    ResizedCrop,
    Rotation,
    to_device_steps,
)
from timm_spinal.training.transforms import resolve_data, seed_rng, train_transform

from .images import TinyModel, quick_config

COUNT, SIZE = 48, (30, 40)
CPU = torch.device('cpu')
MANY = 6000


def photo() -> Image.Image:
    """Smooth colours with some noise on them: neighbours are alike, as in a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(SIZE[::-1], Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (*SIZE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def pixels(image) -> torch.Tensor:
    return F.pil_to_tensor(image).float()


def batch(image, count=COUNT) -> torch.Tensor:
    return F.pil_to_tensor(image).expand(count, -1, -1, -1)


def apply(step, image, count=COUNT, seed=0):
    """The step's images and its parameters as lists."""
    drawn = step.draw(Draws(count, seed), SIZE)
    return step(batch(image, count), drawn).float(), {name: values.tolist() for name, values in drawn.items()}


def differences(ours, expected) -> torch.Tensor:
    return ours - torch.stack([pixels(image) for image in expected])


def close(off: torch.Tensor, most: int, mean: float) -> bool:
    """At most so many levels apart anywhere, in the mean hardly, and neither brighter nor darker."""
    return off.abs().max() <= most and off.abs().mean() <= mean and off.mean().abs() <= mean / 5


# ---- what a step computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('kind', [*FILTERS, 'random'])
def test_resized_crops_are_those_of_pillow(kind, mode):
    crop, image = RandomResizedCropAndInterpolation((24, 28), interpolation=kind), photo().convert(mode)
    modes = crop.interpolation if kind == 'random' else [crop.interpolation]
    ours, drawn = apply(ResizedCrop(crop), image)
    boxes = zip(*(drawn[k] for k in ('top', 'left', 'high', 'wide')))
    expected = [F.resized_crop(image, *box, (24, 28), modes[i]) for box, i in zip(boxes, drawn['kind'])]
    assert close(differences(ours, expected), 3, 0.07)  # where a value is half way between two levels
    assert len(set(drawn['kind'])) == len(modes) and max(drawn['high']) > 24 and min(drawn['wide']) < 28


def test_padded_crops_and_flips_move_pixels():
    image = photo()
    ours, drawn = apply(PadCrop(tv.RandomCrop((26, 32), padding=4)), image)
    padded = F.pad(image, [4] * 4)
    expected = [F.crop(padded, top, left, 26, 32) for top, left in zip(drawn['top'], drawn['left'])]
    assert close(differences(ours, expected), 0, 0.)
    assert len(set(drawn['top'])) > 9 and min(drawn['left']) < 4 and max(drawn['left']) > 12
    for dim, flip in ((-1, F.hflip), (-2, F.vflip)):
        ours, drawn = apply(Flip(tv.RandomHorizontalFlip(0.5), dim), image)
        expected = [flip(image) if flipped else image for flipped in drawn['flip']]
        assert close(differences(ours, expected), 0, 0.) and 10 < sum(drawn['flip']) < 38


def test_rotation_and_perspective_are_those_of_torchvision():
    pytest.importorskip('kornia')
    image = photo()
    ours, drawn = apply(Rotation(tv.RandomRotation(40)), image)
    off = differences(ours, [F.rotate(image, angle, fill=[0.] * 3) for angle in drawn['angle']])
    assert (off != 0).float().mean() < 2e-3 and min(drawn['angle']) < -30 and max(drawn['angle']) > 30
    start = [[0, 0], [SIZE[1] - 1, 0], [SIZE[1] - 1, SIZE[0] - 1], [0, SIZE[0] - 1]]
    ours, drawn = apply(Perspective(tv.RandomPerspective(p=0.6)), image)
    expected = [F.perspective(image, start, end, F.InterpolationMode.BILINEAR, [0] * 3) if changed else image
                for end, changed in zip(drawn['ends'], drawn['apply'])]
    off = differences(ours, expected)
    assert (off.abs() > 1).float().mean() < 2e-3 and off.mean().abs() < 0.1 and 15 < sum(drawn['apply']) < 45


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_colours_change_as_torchvision_changes_them(mode):
    image = photo().convert(mode)
    ours, drawn = apply(ColorJitter(tv.ColorJitter(0.4, 0.4, 0.4), p=0.8), image)
    changes = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation
    expected = []
    for factors, order in zip(drawn['factors'], drawn['order']):
        changed = image
        for change in order:
            changed = changes[change](changed, factors[change])
        expected.append(changed)
    assert close(differences(ours, expected), 2, 0.1)
    assert sum(factors == [1., 1., 1.] for factors in drawn['factors']) > 2
    ours, drawn = apply(Grayscale(tv.RandomGrayscale(0.5)), image)
    expected = [F.to_grayscale(image, len(mode)) if grey else image for grey in drawn['apply']]
    assert close(differences(ours, expected), 0, 0.) and 10 < sum(drawn['apply']) < 38


def test_blur_is_that_of_torchvision():
    pytest.importorskip('kornia')
    image = photo()
    ours, drawn = apply(Blur(tv.GaussianBlur(23), p=0.5), image)
    expected = [F.gaussian_blur(image, [23, 23], [sigma, sigma]) if blurred else image
                for sigma, blurred in zip(drawn['sigma'], drawn['apply'])]
    assert close(differences(ours, expected), 1, 0.01) and 10 < sum(drawn['apply']) < 38


@pytest.mark.parametrize('mode, mean, std', [('const', 0., 0.), ('rand', 0., 1.), ('pixel', 0., 1.)])
def test_erased_pixels_are_zeros_or_normal_noise(mode, mean, std):
    step = Erase(RandomErasing(0.7, mode=mode, max_count=3, device='cpu'))
    drawn = step.draw(Draws(400, 1), SIZE)
    erased = step(torch.full((400, 3, *SIZE), 9.), drawn)
    inside = erased != 9.
    expected = torch.zeros(400, *SIZE, dtype=torch.bool)
    for image, (boxes, applied) in enumerate(zip(drawn['boxes'].tolist(), drawn['apply'].tolist())):
        for top, left, bottom, right in boxes if applied else ():
            expected[image, top:bottom, left:right] = True
    assert torch.equal(inside, expected[:, None].expand(-1, 3, -1, -1))
    noise = erased[inside]
    assert abs(noise.mean() - mean) < 0.1 and abs(noise.std() - std) < 0.1
    if mode == 'pixel':  # images have noise of their own
        first, second = (erased[i][inside[i]][:50] for i in drawn['apply'].nonzero()[:2, 0].tolist())
        assert not torch.equal(first, second)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def boxes_of(erasing) -> list[float]:
    """Height, width, top and left of the rectangle that timm erases."""
    rows, columns = (erasing(torch.ones(1, *SIZE))[0] == 0).nonzero().unbind(1)
    return [(rows.max() - rows.min() + 1).item(), (columns.max() - columns.min() + 1).item(), rows.min().item(),
            columns.min().item()]


RRC = RandomResizedCropAndInterpolation(28)
TALL = RandomResizedCropAndInterpolation(28, scale=(0.9, 1.), ratio=(0.2, 0.9))  # often fits at the tenth try, or never
CROP, JITTER, ERASING = tv.RandomCrop((30, 40)), tv.ColorJitter(0.4, 0.3, 0.2), RandomErasing(1., device='cpu')


@pytest.mark.parametrize('step, names, ordinary', [
    (ResizedCrop(RRC), ['top', 'left', 'high', 'wide'], lambda: RRC.get_params(photo(), RRC.scale, RRC.ratio)),
    (ResizedCrop(TALL), ['top', 'left', 'high', 'wide'], lambda: TALL.get_params(photo(), TALL.scale, TALL.ratio)),
    (PadCrop(tv.RandomCrop(SIZE, padding=4)), ['top', 'left'],
     lambda: CROP.get_params(torch.zeros(1, SIZE[0] + 8, SIZE[1] + 8), SIZE)[:2]),
    (Rotation(tv.RandomRotation(15)), ['angle'], lambda: [tv.RandomRotation.get_params([-15, 15])]),
    (Perspective(tv.RandomPerspective()), ['ends'],
     lambda: np.ravel(tv.RandomPerspective.get_params(SIZE[1], SIZE[0], 0.5)[1])),
    (ColorJitter(JITTER), ['factors', 'order'], lambda: [
        *(params := JITTER.get_params(JITTER.brightness, JITTER.contrast, JITTER.saturation, None))[1:4],
        *[i for i in params[0].tolist() if i < 3]]),
    (Blur(tv.GaussianBlur(23)), ['sigma'], lambda: [tv.GaussianBlur.get_params(0.1, 2.)]),
    (Erase(ERASING), ['box'], lambda: boxes_of(ERASING)),
], ids=lambda value: type(value).__name__ if isinstance(value, device_augment.Step) else '')
def test_moments_of_what_is_drawn(step, names, ordinary, monkeypatch):
    """Means and standard deviations, within five standard errors of the ordinary transform's."""
    if step.needs_kornia:
        pytest.importorskip('kornia')
    photo_once = photo()
    monkeypatch.setitem(globals(), 'photo', lambda: photo_once)
    drawn = step.draw(Draws(MANY, 5), SIZE)
    if 'boxes' in drawn:
        top, left, bottom, right = drawn['boxes'][:, 0].unbind(1)
        drawn['box'] = torch.stack([bottom - top, right - left, top, left], 1)
    ours = torch.cat([drawn[name].double().reshape(MANY, -1) for name in names], 1)
    seed_rng(7)
    theirs = torch.tensor(np.array([ordinary() for _ in range(MANY // 2)]), dtype=torch.float64)
    error = (theirs.var(0) * (1 / MANY + 2 / MANY)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-9).all(), (ours.mean(0), theirs.mean(0))
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=1e-9), (ours.std(0), theirs.std(0))


def test_probabilities_of_what_is_drawn():
    draws = Draws(MANY, 2)
    for p in (0., 0.1, 0.5, 1.):
        assert draws.happens(p).double().mean() == pytest.approx(p, abs=0.02)
    counts = Erase(RandomErasing(0.3, max_count=3, device='cpu')).draw(Draws(MANY, 3), SIZE)
    boxes = (counts['boxes'][..., 2] > counts['boxes'][..., 0]).sum(1)
    assert (boxes.bincount() / MANY).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.03)
    assert counts['apply'].double().mean() == pytest.approx(0.3, abs=0.03)


def test_draws_depend_on_seed_epoch_and_position_alone():
    step = ResizedCrop(RRC)
    long, short = (step.draw(Draws(count, 3, 1, 4), SIZE) for count in (100, 37))
    assert all(torch.equal(long[name][:37], short[name]) for name in long)
    assert not torch.equal(long['top'], step.draw(Draws(100, 3, 2, 4), SIZE)['top'])
    assert not torch.equal(long['top'], long['left'])


# ---- whole transforms -----------------------------------------------------------------------------------------------


def transform_of(**options):
    config = quick_config(img_size=20, **options)
    return train_transform(config, resolve_data(config, TinyModel))


EVERYTHING = dict(
    rotation=20., perspective=0.5, vflip=0.3, color_jitter=0.4, color_jitter_prob=0.8, grayscale_prob=0.2,
    gaussian_blur_prob=0.3, reprob=0.4, remode='const')


@pytest.mark.parametrize('options', [
    {}, dict(pad_crop=4),
    pytest.param(dict(pad_crop=2, **EVERYTHING), marks=pytest.mark.slow),
    pytest.param(EVERYTHING, marks=pytest.mark.slow),
], ids=['defaults', 'padded crop', 'padded crop and all', 'all'])
def test_images_have_the_moments_of_the_ordinary_path(options):
    """Mean and deviation of each pixel over many epochs of one image."""
    pytest.importorskip('kornia')
    transform, count = transform_of(**options), 1500
    once, augment = to_device_steps(transform, 'RGB', CPU)
    image = photo()
    for step in once:
        image = step(image)
    drawn = augment.draw(count, image.size[::-1], 3, 0)
    ours = augment(batch(image, count), drawn)
    seed_rng(4)
    theirs = torch.stack([transform(photo()) for _ in range(count)])
    assert ours.shape == theirs.shape == (count, 3, 20, 20) and ours.dtype == torch.float32
    error = (theirs.var(0) * 2 / count).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() / error).max() < 5.5
    assert (ours.std(0) / theirs.std(0)).sub(1).abs().max() < 0.25
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)


@pytest.mark.parametrize('options, reason', [
    (dict(aa='rand-m9'), 'RandAugment has no step'),
    (dict(aa='augmix-m3'), 'AugMixAugment'),
    (dict(aa='original'), 'AutoAugment'),
    (dict(train_crop_mode='rkrr'), 'ResizeKeepRatio'),
    (dict(train_interpolation='nearest'), '--train-interpolation nearest'),
    (dict(train_interpolation='box'), '--train-interpolation box'),
])
def test_what_the_device_cannot_do_is_named(options, reason):
    with pytest.raises(NotOnDevice, match=reason):
        to_device_steps(transform_of(**options), 'RGB', CPU)


def test_modes_other_than_grey_and_rgb_are_left_to_the_loader():
    with pytest.raises(NotOnDevice, match='HSV'):
        to_device_steps(transform_of(), 'HSV', CPU)
    once, augment = to_device_steps(transform_of(no_aug=True), 'HSV', CPU)
    assert len(once) == 2 and not augment.steps


def test_without_kornia_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(device_augment.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(NotOnDevice, match=r"Rotation on the device needs kornia; pip install 'timm-spinal\[device\]'"):
        to_device_steps(transform_of(rotation=5.), 'RGB', CPU)
    assert to_device_steps(transform_of(), 'RGB', CPU)[1].side == 20


def test_python_and_torch_draw_nothing():
    """What is drawn on the device does not disturb the streams that dropout and others draw from."""
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    augment = to_device_steps(transform_of(reprob=0.5, remode='pixel'), 'RGB', CPU)[1]
    augment(batch(photo(), 4), augment.draw(4, SIZE, 0, 0))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
