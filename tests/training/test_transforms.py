import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from timm_spinal.errors import UserError
from timm_spinal.training.transforms import eval_transform, image_mode, resolve_data, seed_rng, train_transform

from .images import TinyModel, quick_config

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
PLAIN = dict(scale=[1., 1.], ratio=[1., 1.], hflip=0., color_jitter=None, train_interpolation='bilinear')


class GreyModel(TinyModel):
    in_chans = 1


def test_data_config_follows_model_and_flags():
    data = resolve_data(quick_config(), TinyModel)
    assert data['input_size'] == (3, 8, 8) and data['std'] == (0.25,) * 3 and data['interpolation'] == 'bilinear'
    data = resolve_data(quick_config(img_size=16, mean=[0.1], std=[0.2, 0.3, 0.4], crop_pct=0.9), TinyModel)
    assert (data['input_size'], data['mean'], data['std']) == ((3, 16, 16), (0.1,) * 3, (0.2, 0.3, 0.4))
    assert data['crop_pct'] == 0.9


def test_a_grey_model_gets_one_mean_and_grey_images():
    class Uneven(GreyModel):
        pretrained_cfg = dict(GreyModel.pretrained_cfg, mean=(0.1, 0.2, 0.6))

    data = resolve_data(quick_config(), Uneven)
    assert data['input_size'] == (1, 8, 8) and data['mean'] == pytest.approx((0.3,)) and data['std'] == (0.25,)
    assert image_mode(quick_config(), 1) == 'L' and image_mode(quick_config(), 3) == 'RGB'
    assert image_mode(quick_config(input_img_mode='CMYK'), 4) == 'CMYK'


@pytest.mark.parametrize('options', [dict(mean=[0.5, 0.5]), dict(in_chans=1), dict(input_size=[1, 8, 8])])
def test_channels_that_do_not_agree(options):
    with pytest.raises(UserError, match='channels'):
        resolve_data(quick_config(**options), TinyModel)
    with pytest.raises(UserError, match='--input-img-mode'):
        image_mode(quick_config(), 2)


@pytest.mark.parametrize('mode, channels, reason', [
    ('GREY', 3, '--input-img-mode GREY: is not a mode of Pillow with 8 bits a channel; .* 3 .* use one of .*RGB'),
    ('P', 1, 'is not a mode .* use one of L$'),
    ('I;16', 1, 'is not a mode'),
    ('F', 1, 'is not a mode'),
    ('rgb', 3, 'is not a mode'),
    ('L', 3, 'has 1 channel.*, the model takes 3; use one of .*RGB'),
    ('RGBA', 3, 'has 4 channel.*, the model takes 3'),
    ('', 2, 'input channels: 2, for which --input-img-mode has no default; use one of LA'),
    ('', 5, 'input channels: 5, .* none has so many'),
])
def test_image_modes_that_the_model_cannot_take(mode, channels, reason):
    with pytest.raises(UserError, match=reason):
        image_mode(quick_config(input_img_mode=mode), channels)


@pytest.mark.parametrize('options, reason', [
    (dict(interpolation='foo'), '--interpolation foo: unknown; use nearest, bilinear, bicubic, box, hamming, lanczos'),
    (dict(interpolation='random'), '--interpolation random'),
    (dict(std=[0.2, 0., 0.2]), '--std 0'),
])
def test_values_that_no_image_could_use(options, reason):
    with pytest.raises(UserError, match=reason):
        resolve_data(quick_config(**options), TinyModel)


def test_pad_crop_moves_the_image_over_black():
    """As on CIFAR: each place within 2 pixels of padding is taken equally often, and nothing is resized."""
    config = quick_config(pad_crop=2, img_size=40, hflip=0., color_jitter=None)
    data = resolve_data(config, TinyModel)
    photo = PHOTO.crop((0, 0, 40, 40))
    padded = tv.functional.pad(tv.functional.to_tensor(photo), [2] * 4)
    places = {padded[:, y:y + 40, x:x + 40].numpy().tobytes(): (y, x) for y in range(5) for x in range(5)}
    transform = train_transform(config, data)
    seed_rng(0)
    normalize = tv.Normalize([-2.] * 3, [4.] * 3)  # back to 0 .. 1
    found = [places[normalize(transform(photo)).mul(255).round().div(255).numpy().tobytes()] for _ in range(500)]
    assert len(set(found)) == 25 and max(map(found.count, places.values())) < 45
    # larger images are resized first
    assert train_transform(config, data)(PHOTO).shape == (3, 40, 40)
    plain = train_transform(quick_config(no_aug=True, img_size=40), data)
    config.no_aug = True
    assert torch.equal(train_transform(config, data)(PHOTO), plain(PHOTO))


def test_pad_crop_takes_the_place_of_other_crops():
    config = quick_config(pad_crop=4, train_crop_mode='rkrc')
    with pytest.raises(UserError, match='--pad-crop 4: .*--train-crop-mode rkrc; leave one of them out'):
        train_transform(config, resolve_data(config, TinyModel))


@pytest.mark.parametrize('name', ['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random', ''])
def test_every_interpolation_of_timm_works(name):
    config = quick_config(train_interpolation=name, interpolation='' if name == 'random' else name)
    data = resolve_data(config, TinyModel)
    assert train_transform(config, data)(PHOTO).shape == eval_transform(data)(PHOTO).shape == (3, 8, 8)
    config.no_aug = True
    assert train_transform(config, data)(PHOTO).shape == (3, 8, 8)


def test_evaluation_is_resize_crop_normalise():
    image = eval_transform(resolve_data(quick_config(), TinyModel))(PHOTO)
    expected = tv.Compose([tv.Resize(8), tv.CenterCrop(8), tv.ToTensor(), tv.Normalize([0.5] * 3, [0.25] * 3)])(PHOTO)
    assert torch.equal(image, expected)


def test_no_aug_is_deterministic_and_overrides_everything():
    config = quick_config(no_aug=True, rotation=30., perspective=1., aa='rand-m9', hflip=1., reprob=1.)
    transform = train_transform(config, resolve_data(config, TinyModel))
    square = PHOTO.crop((0, 0, 40, 40))
    expected = eval_transform(resolve_data(config, TinyModel))(square)
    assert torch.equal(transform(square), transform(square)) and torch.equal(transform(square), expected)


def test_flip_is_the_only_change_when_it_is_the_only_option():
    square = PHOTO.crop((0, 0, 40, 40))
    config = quick_config(**{**PLAIN, 'hflip': 1.})
    data = resolve_data(config, TinyModel)
    plain = train_transform(quick_config(**PLAIN), data)(square)
    assert torch.equal(train_transform(config, data)(square), plain.flip(-1))


def test_perspective_and_rotation_come_first_on_the_whole_image():
    square = PHOTO.crop((0, 0, 40, 40))
    config = quick_config(**PLAIN, rotation=20., perspective=1.)
    data = resolve_data(config, TinyModel)
    seed_rng(3)
    image = train_transform(config, data)(square)
    seed_rng(3)
    turned = tv.RandomRotation(20)(tv.RandomPerspective(p=1.)(square))
    assert torch.equal(image, train_transform(quick_config(**PLAIN), data)(turned))
    assert not torch.equal(image, train_transform(quick_config(**PLAIN), data)(square))


@pytest.mark.parametrize('options', [
    dict(aa='rand-m9-mstd0.5'), dict(aa='augmix-m3'), dict(aa='original'), dict(aa='3a'),
    dict(train_crop_mode='rkrc'), dict(reprob=1., remode='pixel', recount=2),
    dict(color_jitter=0.4, grayscale_prob=0.5, color_jitter_prob=0.5),
])
@pytest.mark.parametrize('model', [TinyModel, GreyModel])
def test_every_augmentation_works_on_colour_and_grey(options, model):
    config = quick_config(**options)
    transform = train_transform(config, resolve_data(config, model))
    image = PHOTO.convert(image_mode(config, model.in_chans))
    seed_rng(0)
    outputs = [transform(image) for _ in range(4)]
    assert all(o.shape == (model.in_chans, 8, 8) and o.isfinite().all() for o in outputs)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize('options', [dict(aa='foo'), dict(train_interpolation='cubist'),
                                     dict(train_interpolation='cubist', no_aug=True)])
def test_what_timm_refuses_is_one_line(options):
    config = quick_config(**options)
    with pytest.raises(UserError, match='augmentation') as error:
        train_transform(config, resolve_data(config, TinyModel))
    assert '\n' not in str(error.value)
