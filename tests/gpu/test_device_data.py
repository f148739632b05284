"""Images that live on the device: the batches of the CPU, made without waiting, at the speed of bare steps."""
import statistics

import pytest
import torch
from accelerate import Accelerator

from timm_spinal.bench.loops import bare_steps, our_epochs
from timm_spinal.bench.runner import Setting, paired_ratio, seconds_in_turns
from timm_spinal.training.device_data import Decoded, DeviceData

from ..training.images import make_data, make_folder, quick_config
from .conftest import DEVICE, difference

AUGMENTED = dict(
    img_size=32, hflip=0.5, vflip=0.3, color_jitter=0.4, grayscale_prob=0.2, reprob=0.5, remode='pixel',
    data_on_device='always')


@pytest.mark.parametrize('options', [
    dict(no_aug=True), AUGMENTED, dict(AUGMENTED, pad_crop=4),
    dict(AUGMENTED, rotation=10., perspective=0.5, gaussian_blur_prob=0.3),
], ids=['none', 'resized crop', 'padded crop', 'kornia'])
def test_batches_are_those_of_the_cpu(options, device, tmp_path):
    """Rounding moves few pixels, and those by a level or two; without augmentation none."""
    pytest.importorskip('kornia')
    config = quick_config(data_dir=str(make_folder(tmp_path / 'data', per_class=32, size=40)), **options)
    kept = make_data(config, accelerator=Accelerator(cpu=DEVICE == 'cpu')).train_loader.dataset
    assert isinstance(kept, DeviceData) and kept.images.device.type == device.type
    ours, theirs = first_epoch(kept), first_epoch(on_cpu(kept))
    assert ours.shape == theirs.shape == (64, 3, *((8, 8) if config.no_aug else (32, 32)))
    if config.no_aug:
        ordinary = make_data(config)
        ordinary.set_epoch(1)
        by_loader = torch.cat([images for images, _ in ordinary.train_loader])
        assert torch.equal(ours, theirs) and torch.equal(ours, by_loader)
    else:
        assert ((ours - theirs).abs() > 0.05).float().mean() < 2e-3 and difference(ours, theirs) < 1


def first_epoch(data: DeviceData) -> torch.Tensor:
    data.begin_epoch(1)
    return data.__getitems__(list(range(len(data))))[0].cpu()


def on_cpu(data: DeviceData) -> DeviceData:
    """The same images, and the steps of their augmentation, which work on the CPU from then on."""
    decoded = Decoded(data.images.cpu(), data.targets.cpu(), torch.zeros(len(data), dtype=torch.bool))
    finish = data.augment.finish
    finish.mean, finish.std = finish.mean.cpu(), finish.std.cpu()
    return DeviceData(data.split, decoded, data.augment, torch.device('cpu'), data.sampler)


def test_making_a_batch_does_not_wait(device, tmp_path):
    if DEVICE != 'cuda':
        pytest.skip('needs a CUDA device')
    root = make_folder(tmp_path / 'data', per_class=32, size=40)
    data = make_data(quick_config(data_dir=str(root), rotation=5., perspective=0.5, gaussian_blur_prob=0.5,
                                  batch_size=16, **AUGMENTED), accelerator=Accelerator())
    data.set_epoch(0)
    list(data.train_loader)
    torch.cuda.set_sync_debug_mode('error')
    try:
        assert len(list(data.train_loader)) == 4
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_an_epoch_takes_little_longer_than_its_bare_steps(device, capsys):
    """At 32 pixels; printed, and bounded on a GPU only, where nothing else runs."""
    on_gpu = DEVICE == 'cuda'
    setting = Setting(batch_size=128, img_size=32, rounds=9 if on_gpu else 1, warmup=1, batches=100 if on_gpu else 2)
    sides = seconds_in_turns(our_epochs(setting, 'resnet20_cifar'), bare_steps(setting, 'resnet20_cifar'), setting)
    ratio, speed = paired_ratio(*sides), setting.batches * setting.batch_size / statistics.median(sides[0])
    with capsys.disabled():
        print(f'\nresnet20_cifar at 32 px, our epoch / bare steps: {ratio}; {speed:,.0f} images/s')
    assert not on_gpu or ratio.median < 1 / 0.9
