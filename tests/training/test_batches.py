"""What happens to batches on the device: against timm, and against the loader that does all of it."""
import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from timm_spinal.training.batches import BatchMixup, Erasing, Finished, on_device, pin_memory, split_for_device
from timm_spinal.training.data import create_data
from timm_spinal.training.splits import create_datasets
from timm_spinal.training.transforms import resolve_data, train_transform

from .runs import small_config


class Net(torch.nn.Module):
    pretrained_cfg = dict(input_size=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def batches(config, on_device):
    data = create_data(config, Net(), create_datasets(config), on_device=on_device)
    data.set_epoch(1)
    found = []
    for images, target, *given in data.train_loader:
        assert images.dtype == (torch.uint8 if on_device else torch.float32)
        found.append(data.to_batch(images, target, *given))
    return found


@pytest.mark.parametrize('options', [{}, dict(aa='rand-m9-mstd0.5', channels_last=True), dict(no_aug=True)])
def test_the_same_batches_as_the_loader_makes(tmp_path, options):
    """Bit for bit, where nothing is erased."""
    config = small_config(tmp_path, **options)
    here, there = batches(config, False), batches(config, True)
    assert len(here) == 5 and all(torch.equal(a, b) for one, two in zip(here, there) for a, b in zip(one, two))
    assert there[0][0].is_contiguous(memory_format=torch.channels_last) == bool(options.get('channels_last'))


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_erasing_is_as_timms(tmp_path, mode):
    """As many images, as large a part of them, and pixels of the same mean and spread."""
    timms = RandomErasing(0.6, mode=mode, max_count=3, device='cpu')
    ours, marked = Erasing(timms), torch.full((1500, 1, 24, 16), 99.)
    torch.manual_seed(0)
    expected = timms(marked.clone())
    found = ours.fill(marked, torch.stack([ours.draw(24, 16) for _ in marked]))
    for measure in (lambda x: (x != 99).flatten(1).any(1).float().mean(), lambda x: (x != 99).float().mean()):
        assert measure(found).item() == pytest.approx(measure(expected).item(), abs=0.04)
    one, two = found[found != 99], expected[expected != 99]
    assert (one.mean().item(), one.std().item()) == pytest.approx((two.mean().item(), two.std().item()), abs=0.07)
    per_image = [x[x != 99].unique().numel() for x in found]
    assert max(per_image) > 100 if mode == 'pixel' else max(per_image) == {'rand': 3, 'const': 1}[mode]


def test_erasing_is_drawn_with_the_batch(tmp_path):
    """Whatever the workers and the epochs before, the boxes of an epoch are the same; its noise is the device's."""
    config = small_config(tmp_path, reprob=0.8, recount=2)
    boxes = []
    for first in (0, 1):
        data = create_data(config, Net(), create_datasets(config), on_device=True)
        for epoch in range(first, 2):
            data.set_epoch(epoch)
            found = [given for _, _, given in data.train_loader]
        boxes.append(torch.cat(found))
    assert torch.equal(*boxes) and boxes[0].shape == (20, 2, 4) and (boxes[0] > 0).any()
    config.reprob = 0.
    assert len(next(iter(create_data(config, Net(), create_datasets(config), on_device=True).train_loader))) == 2


def test_a_transform_that_makes_floats_itself_stays_whole(tmp_path):
    config = small_config(tmp_path)
    transform = train_transform(config, resolve_data(config, Net()))
    transform.transforms.append(torch.nn.Identity())
    begin, finish = split_for_device(transform)
    assert begin is transform and finish.erasing is None
    assert torch.equal(finish(torch.ones(2, 3))[0], torch.ones(2, 3))


def test_finished_can_be_iterated_again(tmp_path):
    config = small_config(tmp_path, no_aug=True, reprob=0.5)
    data = create_data(config, Net(), create_datasets(config), on_device=True)
    again = Finished(data.train_loader, data.finish)
    one, two = ([(x.shape, x.dtype, len(y)) for x, y in again] for _ in range(2))
    assert one == two == [((4, 3, 32, 32), torch.float32, 4)] * 5


@pytest.mark.parametrize('mode', ['elem', 'pair', 'batch'])
@pytest.mark.parametrize('options', [
    dict(mixup_alpha=0.3), dict(mixup_alpha=0.3, cutmix_alpha=1., prob=0.7), dict(cutmix_minmax=(0.2, 0.8)),
    dict(mixup_alpha=0.3, cutmix_alpha=1., correct_lam=False),
], ids=['mixup', 'both', 'minmax', 'uncorrected'])
def test_mixing_is_timms(mode, options):
    """The same images and targets to the bit, from the same draws."""
    images, target = torch.randn(10, 3, 20, 24), torch.arange(10) % 4
    results = []
    for kind in (Mixup, BatchMixup):
        np.random.seed(3)
        mix = kind(**options, mode=mode, num_classes=4)
        results += [mix(images.clone(), target) for _ in range(3)]
    for timms, ours in zip(results[:3], results[3:]):
        assert torch.equal(timms[0], ours[0]) and torch.equal(timms[1], ours[1])
    assert not torch.equal(results[0][0], images)


def test_on_a_cpu_batches_come_as_they_are():
    loader = DataLoader(list(range(4)), batch_size=2)
    pin_memory([loader], torch.device('cpu'))
    assert not loader.pin_memory and [b.tolist() for b in on_device(loader, torch.device('cpu'))] == [[0, 1], [2, 3]]
    pin_memory([loader], torch.device('cuda'))
    assert loader.pin_memory
