import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment

from timm_spinal.errors import UserError
from timm_spinal.training.transforms import (
    check_policy,
    eval_transform,
    operations,
    posterize,
    resolve_data,
    seed_rng,
    train_transform,
)

from .images import TinyModel, quick_config

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
AUTO = ('original', 'originalr', 'v0', 'v0r', '3a')


def with_channels(channels):
    class Model(TinyModel):
        in_chans = channels

    return Model


def make_transform(channels=3, **options):
    config = quick_config(**options)
    return train_transform(config, resolve_data(config, with_channels(channels)))


def policy_of(aa, channels=3, **options):
    return next(step for step in make_transform(channels, aa=aa, **options).transforms if list(operations(step)))


def certain(operation, magnitude):
    operation.prob, operation.magnitude = 1., magnitude
    return operation


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('aa', [
    *AUTO, *(f'{name}-mstd0.5' for name in AUTO), 'rand-m9', 'rand-m9-mstd0.5-inc1', 'rand-m9-mstd101',
    'rand-m9-inc1-tweights', 'rand-m9-t3aw', 'rand-t3a-n3', 'rand-m30-mmax30-mstd5-inc1', 'rand-m30-mmax30',
    'augmix-m5-w4-d2', 'augmix-m10-b1'])
def test_every_operation_of_a_policy_runs_at_every_magnitude(aa, mode):
    image = PHOTO.convert(mode)
    policy = policy_of(aa, len(mode))
    seed_rng(0)
    for operation in operations(policy):
        for magnitude in range((operation.magnitude_max or 10) + 1):
            after = certain(operation, magnitude)(image)
            assert (after.mode, after.size) == (mode, image.size)
    assert policy(image).mode == mode


@pytest.mark.parametrize('bits', range(-2, 10))
def test_posterize_to_no_bits_is_black(bits):
    for image in (PHOTO, PHOTO.convert('L')):
        mask = 255 & ~(2 ** (8 - min(bits, 8)) - 1)
        assert np.array_equal(posterize(image, bits, fillcolor=0), np.asarray(image) & mask)


def test_policies_of_whole_epochs_run_and_the_other_operations_are_those_of_timm():
    transform = make_transform(aa='rand-m10-inc1-p1', scale=[1., 1.], ratio=[1., 1.], hflip=0.)
    seed_rng(0)
    images = [transform(PHOTO) for _ in range(60)]
    assert all(image.isfinite().all() for image in images)
    for operation in operations(policy_of('rand-m9')):
        if operation.name != 'Posterize':
            assert operation.aug_fn is auto_augment.NAME_TO_OP[operation.name]
    operation = next(o for o in operations(policy_of('rand-m9')) if o.name == 'Posterize')
    assert np.array_equal(certain(operation, 9)(PHOTO), ImageOps.posterize(PHOTO, 3))
    assert auto_augment.NAME_TO_OP['Posterize'] is auto_augment.posterize  # others' policies are left alone
    assert pickle.loads(pickle.dumps(transform)) is not None


@pytest.mark.parametrize('aa, wrong', [
    ('foo', "unknown policy 'foo'"), ('random', "unknown policy 'random'"), ('Rand-m9', "unknown policy 'Rand'"),
    ('rand m9', "unknown policy 'rand m9'"), ('rand-m9-m8', '-m comes twice'),
    ('v0-m5', "'m5' is not understood; v0 takes -mstdNUMBER"),
    *((f'{policy}-{part}', f"'{part}' is not understood") for policy, part in (
        ('rand', 'mX'), ('rand', ''), ('rand', 'inc'), ('rand', 'inc2'), ('rand', 'm9.5'), ('rand', 'p2'),
        ('rand', 'n0'), ('rand-m9', 'bogus5'), ('rand-m9', 'foo'), ('rand-m9', 'tfoo'), ('rand-m9', 'mstdinf'),
        ('rand-m9', 'mmax0'), ('3a', 'mstd'), ('original', 'x'), ('augmix', 'x3'), ('augmix', 'w0'),
        ('augmix-m3', 't3a'))),
])
def test_a_policy_that_timm_does_not_understand(aa, wrong):
    for options in ({}, dict(no_aug=True)):
        with pytest.raises(UserError) as error:
            make_transform(aa=aa, **options)
        assert f'--aa {aa}' in str(error.value) and wrong in str(error.value)


@pytest.mark.parametrize('aa', [
    'rand', 'rand-m9-n3-mstd0.5', 'rand-mstd1-tweights', 'augmix', 'augmix-m5-w4-d2', 'original-mstd0.5'])
def test_policies_of_timms_own_documentation_are_understood(aa):
    check_policy(aa)


@pytest.mark.parametrize('mode, options, step', [
    ('RGBA', dict(aa='rand-m9'), 'AutoContrast of RandAugment'),
    ('CMYK', dict(aa='v0'), 'Equalize of AutoAugment'),
    ('LA', dict(aa='augmix-m3'), 'AutoContrast of AugMixAugment'),
    ('RGBA', dict(grayscale_prob=0.01), 'RandomGrayscale'),
    ('LAB', dict(color_jitter=0.4), 'ColorJitter'),
    ('LAB', dict(color_jitter=0.4, color_jitter_prob=0.01), 'ColorJitter'),
    ('RGB', dict(gaussian_blur_prob=0.01), 'GaussianBlur'),  # its kernel is larger than images of 8 pixels
    ('RGB', dict(aa='rand-m9', train_interpolation='lanczos'), 'Rotate of RandAugment'),
    ('L', dict(aa='rand-n20-tweights'), 'RandAugment'),
    ('RGB', dict(ratio=[0., 0.]), 'RandomResizedCropAndInterpolation'),
])
def test_augmentation_that_fails_is_refused_before_the_first_image(mode, options, step):
    with pytest.raises(UserError) as error:
        make_transform(len(Image.new(mode, (1, 1)).getbands()), input_img_mode=mode, **options)
    message = str(error.value)
    assert message.startswith(f'augmentation: {step} fails on images of mode {mode} (') and '\n' not in message


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'HSV', 'YCbCr', 'LAB', 'RGBA', 'CMYK'])
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
def test_geometry_and_evaluation_work_in_every_mode(mode, crop_mode):
    image = PHOTO.convert(mode)
    channels = len(image.getbands())
    options = dict(input_img_mode=mode, color_jitter=None, crop_mode=crop_mode, crop_pct=0.8)
    for more in (
            dict(rotation=20., perspective=1.), dict(train_crop_mode='rkrc', vflip=1.), dict(reprob=1.),
            dict(no_aug=True)):
        assert make_transform(channels, **options, **more)(image).shape == (channels, 8, 8)
    data = resolve_data(quick_config(**options), with_channels(channels))
    assert eval_transform(data)(image).shape == (channels, 8, 8)


def test_trying_out_draws_nothing():
    seed_rng(3)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    seed_rng(3)
    make_transform(aa='rand-m9-mstd0.5', reprob=0.5, rotation=5.)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
