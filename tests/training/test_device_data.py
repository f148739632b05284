"""Data that live on the device: the same images as through the loader, exact in every way that runs are."""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.evaluation.evaluate import evaluate
from timm_spinal.training import device_data
from timm_spinal.training.device_data import DeviceData, cache_folder, free_memory
from timm_spinal.training.train import train

from .images import TinyModel, make_data, make_folder, make_split, quick_config
from .runs import RANDOM, assert_same_state, command, resumed, small_config, train_until

AUGMENTED = dict(rotation=10., reprob=0.5, pad_crop=2, color_jitter=0.4)


class GreyModel(TinyModel):
    in_chans = 1


@pytest.fixture
def root(tmp_path):
    return str(make_folder(tmp_path / 'data', per_class=11, size=10))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_SPINAL_CACHE', str(tmp_path / 'cache'))


def on_device(config, model=TinyModel, **kwargs):
    """Data of a run of one process, whose training images are on the device."""
    data = make_data(config, model, accelerator=Accelerator(cpu=True), **kwargs)
    assert isinstance(data.train_loader.dataset, DeviceData)
    return data


def batches(data, epoch=0, loader=None):
    data.set_epoch(epoch)
    return [(x.clone(), y.clone()) for x, y in loader or data.train_loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, p) and torch.equal(y, q) for (x, y), (p, q) in zip(a, b))


# ---- the same images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('model', [TinyModel, GreyModel])
@pytest.mark.parametrize('options', [{}, dict(crop_pct=0.7, interpolation='bicubic'), dict(crop_mode='border')])
def test_images_without_augmentation_are_those_of_the_loader(tmp_path, model, options):
    """Photos of several sizes and modes, to the bit, in training and in evaluation."""
    root = make_folder(tmp_path / 'data', per_class=3, size=17)
    rng = np.random.default_rng(1)
    for i, (mode, size) in enumerate([('RGB', (31, 9)), ('L', (8, 20)), ('RGBA', (12, 12)), ('RGB', (40, 33))]):
        pixels = rng.integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8).squeeze()
        for split in ('train', 'validation'):
            Image.fromarray(pixels, mode).save(root / split / 'ant' / f'other{i}.png')
    config = quick_config(data_dir=str(root), no_aug=True, **options)
    ordinary, ours = make_data(config, model), on_device(config, model)
    for epoch in (0, 3):
        assert same(batches(ordinary, epoch), batches(ours, epoch))
    assert not same(batches(ours, 0), batches(ours, 1))
    assert isinstance(ours.eval_loader.dataset, DeviceData)
    assert same(list(ordinary.eval_loader), list(ours.eval_loader)) and len(list(ours.eval_loader)) == 3


@pytest.mark.parametrize('options', [dict(dataset='digits'), dict(val_split_fraction=0.3)])
def test_other_sources(root, options):
    config = quick_config(data_dir=root, no_aug=True, seed=5, **options)
    ordinary, ours = make_data(config), on_device(config)
    assert same(batches(ordinary), batches(ours)) and same(list(ordinary.eval_loader), list(ours.eval_loader))


@pytest.mark.slow
def test_a_run_ends_with_the_same_weights(tmp_path):
    options = dict(no_aug=True, mixup=0.4, epochs=2)
    config = small_config(tmp_path, data_on_device='always', **options)
    loader = replace(config, experiment='loader', data_on_device='never')
    results = train(config), train(loader)
    assert_same_state(config, loader)
    assert results[0]['top1'] == results[1]['top1'] and results[0]['loss'] == results[1]['loss']


# ---- exactness ------------------------------------------------------------------------------------------------------


def test_prepared_and_skipped_loaders_give_the_same_batches(root):
    config = quick_config(data_dir=root, **AUGMENTED)
    expected = batches(on_device(config), 2)
    data, accelerator = on_device(config), Accelerator(cpu=True)
    loader = accelerator.prepare(data.train_loader)
    batches(data, 0, loader)
    assert same(batches(data, 2, loader), expected) and not same(batches(data, 1, loader), expected)
    fresh = on_device(config)
    rest = accelerator.skip_first_batches(accelerator.prepare(fresh.train_loader), 2)
    assert same(batches(fresh, 2, rest), expected[2:])
    assert not same(batches(on_device(config, seed=9), 2), expected)


def test_two_processes_share_the_batches_of_one(root):
    config = quick_config(data_dir=root, **AUGMENTED)
    alone = batches(on_device(config), 1)
    shares = []
    for index in range(2):
        data = on_device(config, num_processes=2)
        loader = prepare_data_loader(data.train_loader, num_processes=2, process_index=index, put_on_device=False)
        shares.append(batches(data, 1, loader))
    assert len(alone) == 6 and [len(s) for s in shares] == [3, 3]
    assert same([share[i] for i in range(3) for share in shares], alone)


def test_repeated_augmentation_gives_an_image_several_times(root):
    config = quick_config(data_dir=root, aug_repeats=2, no_aug=False, color_jitter=None, hflip=0., pad_crop=2)
    data = on_device(config)
    data.set_epoch(0)
    order = data.train_loader.dataset._host_order.tolist()
    assert order[0:20:2] == order[1:21:2] and len(set(order)) == 12
    images = torch.cat([x for x, _ in data.train_loader])
    assert sum(torch.equal(*pair) for pair in images.view(-1, 2, *images.shape[1:])) < 6


@pytest.mark.parametrize('update', [2, 4])
def test_a_resumed_run_is_bit_identical(tmp_path, monkeypatch, capsys, update):
    whole = small_config(tmp_path, rotation=10., remode='pixel', data_on_device='always', **RANDOM)
    train(whole)
    assert 'data on cpu: ' in capsys.readouterr().out
    cut = replace(whole, experiment='cut')
    train_until(monkeypatch, cut, update, RuntimeError())
    train(resumed(cut))
    assert_same_state(whole, cut)


@pytest.mark.slow
def test_a_run_goes_on_as_it_was_begun(tmp_path, monkeypatch, capsys):
    """The memory that is free decides at the start only: another kind of random augmentation would be another run."""
    config = small_config(tmp_path, stop_epoch=1, epochs=4)
    train(config)
    needed = 22 * 3 * 36 * 36
    monkeypatch.setattr(device_data, 'free_memory', lambda device: needed)
    train(resumed(config, stop_epoch=2))  # all that is free will do
    assert f'data on cpu: {tmp_path}/images/train' in capsys.readouterr().out
    monkeypatch.setattr(device_data, 'free_memory', lambda device: needed - 1)
    with pytest.raises(UserError, match='cannot resume: .*train was kept on the device, and now its 22 images of '
                                        '3 x 36 x 36 take .* 100% of .*--data-on-device never'):
        train(resumed(config, stop_epoch=3))
    capsys.readouterr()
    train(resumed(config, stop_epoch=3, data_on_device='never'))
    assert "data_on_device 'auto' -> 'never'" in capsys.readouterr().out.replace(': ', ' ')
    monkeypatch.undo()
    train(resumed(config, stop_epoch=4))
    assert f'data through the loader: {tmp_path}/images/train: the run was begun so' in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_and_evaluate_exactly(tmp_path, launch):
    """Both say once where the data are, and a resumed run ends as a whole one."""
    two = small_config(tmp_path, epochs=2, data_on_device='always', rotation=5., reprob=0.3)
    out = launch(2, *command(two)[1:]).stdout
    assert out.count('data on cpu: ') == 2
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['eval_size'] == 22 and result['skipped'] == 0
    cut = replace(two, experiment='cut')
    launch(2, *command(replace(cut, stop_epoch=1))[1:])
    launch(2, *command(resumed(cut))[1:])
    assert_same_state(two, cut)


def test_evaluation_counts_every_image_once_over_processes(root):
    """The last batch of a process is filled up with images of the first; `gather_for_metrics` cuts them again."""
    data = on_device(quick_config(data_dir=root, no_aug=True))
    whole = torch.cat([x for x, _ in data.eval_loader])
    seen = []
    for index in range(2):
        loader = prepare_data_loader(data.eval_loader, num_processes=2, process_index=index, put_on_device=False)
        seen.append([x for x, _ in loader])
    in_order = torch.cat([part for pair in zip(*seen) for part in pair])
    assert torch.equal(in_order[:22], whole) and torch.equal(in_order[22:], whole[:2])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    accelerator = Accelerator(cpu=True)
    assert evaluate(accelerator, model, accelerator.prepare(data.eval_loader))['images'] == 22


# ---- what does not go on the device ---------------------------------------------------------------------------------


def loader_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith('data ')]


@pytest.mark.parametrize('options, reason', [
    (dict(aa='rand-m9'), 'RandAugment has no step on the device'),
    (dict(img_size=72), 'on a CPU, images of more than 64 pixels are augmented by workers'),
])
def test_augmentation_of_the_ordinary_loader(root, capsys, options, reason):
    data = make_data(quick_config(data_dir=root, **options), accelerator=Accelerator(cpu=True))
    assert not isinstance(data.train_loader.dataset, DeviceData) and not data.augmented_on_device
    assert isinstance(data.eval_loader.dataset, DeviceData)
    first, second = loader_lines(capsys)
    assert first == f'data through the loader: {root}/train: {reason}'
    assert second.startswith(f'data on cpu: {root}/validation: 22 images of 3 x ')


def test_always_names_what_the_device_lacks(root, tmp_path, capsys):
    flags = ['train', '--data-dir', root, '--model', 'test_efficientnet', '--img-size', '32', '--output',
             str(tmp_path / 'out'), '-b', '4', '--data-on-device', 'always']
    assert main([*flags, '--aa', 'rand-m9']) == 2
    error = capsys.readouterr().err.strip()
    assert error == (f'error: --data-on-device always: {root}/train: RandAugment has no step on the device; leave it '
                     f'out')
    assert not (tmp_path / 'out').exists()


def test_always_takes_images_that_auto_leaves_to_workers(root):
    assert on_device(quick_config(data_dir=root, img_size=72, data_on_device='always')).augmented_on_device


def test_images_of_several_sizes(tmp_path, capsys):
    """Random crops of originals of several sizes are left to the loader; a crop after a resize is not."""
    root = make_folder(tmp_path / 'data', per_class=5, size=10)
    Image.new('RGB', (14, 12)).save(root / 'train' / 'bee' / '9.png')
    config = quick_config(data_dir=str(root))
    reason = f'{root}/train: its images have several sizes, 10 x 10 and 14 x 12 among them'
    data = make_data(config, accelerator=Accelerator(cpu=True))
    assert not isinstance(data.train_loader.dataset, DeviceData)
    assert loader_lines(capsys)[0] == f'data through the loader: {reason}'
    with pytest.raises(UserError, match=f'--data-on-device always: {reason}'):
        make_data(replace(config, data_on_device='always'), accelerator=Accelerator(cpu=True))
    padded = on_device(replace(config, pad_crop=1))
    assert padded.train_loader.dataset.images.shape == (11, 3, 8, 8)
    assert on_device(replace(config, no_aug=True))


def test_a_split_that_does_not_fit(root, monkeypatch, capsys):
    free = 22 * 3 * 10 * 10 * 4 - 1
    monkeypatch.setattr(device_data, 'free_memory', lambda device: free)
    data = make_data(quick_config(data_dir=root), accelerator=Accelerator(cpu=True))
    assert not isinstance(data.train_loader.dataset, DeviceData) and isinstance(data.eval_loader.dataset, DeviceData)
    assert 'its 22 images of 3 x 10 x 10 take 0 MiB, more than 25% of' in capsys.readouterr().out
    with pytest.raises(UserError, match='--data-on-device always: .*more than 25% of'):
        make_data(quick_config(data_dir=root, data_on_device='always'), accelerator=Accelerator(cpu=True))
    monkeypatch.setattr(device_data, 'free_memory', lambda device: free + 1)
    assert on_device(quick_config(data_dir=root))


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    free = free_memory(torch.device('cpu'))
    assert 2 ** 24 < free < 2 ** 50
    (tmp_path / 'limit').write_text('5000000\n')
    (tmp_path / 'used').write_text('2000000\n')
    monkeypatch.setattr(device_data, 'CGROUPS', [(str(tmp_path / 'limit'), str(tmp_path / 'used'))])
    assert free_memory(torch.device('cpu')) == 3_000_000
    (tmp_path / 'limit').write_text('max\n')
    assert free_memory(torch.device('cpu')) > 2 ** 24


def test_never_and_a_test_split(root, capsys):
    make_split(Path(root) / 'test', size=10)
    never = make_data(quick_config(data_dir=root, data_on_device='never'), accelerator=Accelerator(cpu=True))
    assert not loader_lines(capsys)
    assert not isinstance(never.eval_loader.dataset, DeviceData)
    config = quick_config(data_dir=root, test_split='test')
    assert not isinstance(on_device(config).test_loader.dataset, DeviceData)  # it is looked at once
    assert isinstance(on_device(replace(config, data_on_device='always')).test_loader.dataset, DeviceData)


# ---- images that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize('pad_crop', [None, 1])
def test_unreadable_images_are_replaced_and_left_out_as_by_the_loader(root, pad_crop):
    for split in ('train', 'validation'):
        (Path(root) / split / 'ant' / '0.png').write_bytes(b'none')  # the first of all
        (Path(root) / split / 'ant' / '5.png').unlink()
        (Path(root) / split / 'ant' / '5.png').symlink_to('nothing')
    config = quick_config(data_dir=root, no_aug=True, skip_unreadable=True, pad_crop=pad_crop)
    ordinary, ours = make_data(config), on_device(config)
    assert same(batches(ordinary), batches(ours)) and same(list(ordinary.eval_loader), list(ours.eval_loader))
    assert ordinary.skipped() == ours.skipped() == 4
    augmented = on_device(replace(config, no_aug=False))
    assert all(y.min() >= 0 and x.isfinite().all() for x, y in batches(augmented))
    for loader in (make_data, on_device):
        with pytest.raises(UserError, match='image .*0.png cannot be read .*--skip-unreadable'):
            batches(loader(replace(config, skip_unreadable=False)))
    assert not list(cache_folder().glob('*train*'))


def test_nothing_that_can_be_read(root):
    for path in Path(root).rglob('*.png'):
        path.write_bytes(b'none')
    with pytest.raises(UserError, match='22 images in a row|100 images in a row'):
        batches(make_data(quick_config(data_dir=root, skip_unreadable=True), accelerator=Accelerator(cpu=True)))


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_the_cache_is_read_and_has_the_same_images(root, capsys):
    config = quick_config(data_dir=root, **AUGMENTED)
    first = batches(on_device(config))
    assert ', cached in ' in loader_lines(capsys)[0] and len(list(cache_folder().iterdir())) == 2
    for path in Path(root).rglob('*.png'):  # the pixels do not come from here: sizes and times stay
        times, data = path.stat(), path.read_bytes()
        path.write_bytes(bytes(len(data)))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    Image.new('RGB', (10, 10)).save(Path(root) / 'x.png')
    for path in sorted(Path(root).rglob('*/0.png')):  # of which the size is looked at
        stat = path.stat()
        pixels = (Path(root) / 'x.png').read_bytes()
        path.write_bytes(pixels + bytes(stat.st_size - len(pixels)))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = on_device(config)
    assert same(batches(again), first)
    assert all(f'from {cache_folder()}' in line for line in loader_lines(capsys))


@pytest.mark.parametrize('change', ['touched', 'added', 'damaged', 'cut', 'emptied'])
def test_a_stale_or_damaged_cache_is_not_used(root, capsys, change):
    config = quick_config(data_dir=root, no_aug=True)
    on_device(config)
    cache, = cache_folder().glob('*train*')
    good, image = cache.read_bytes(), Path(root) / 'train' / 'bee' / '3.png'
    if change == 'touched':
        os.utime(image, ns=(1, 1))
    elif change == 'added':
        image.with_name('99.png').write_bytes(image.read_bytes())
    else:
        kept = dict(damaged=good[:-1] + bytes([good[-1] ^ 1]), cut=good[:-9], emptied=b'')[change]
        cache.write_bytes(kept)
    reason = 'is stale: the images' if change in ('touched', 'added') else 'is damaged'
    with pytest.raises(UserError, match=f'--data-on-device always: the cache {cache} {reason}.*; remove it, and it is'):
        make_data(replace(config, data_on_device='always'), accelerator=Accelerator(cpu=True))
    capsys.readouterr()
    ours = on_device(config)
    assert f'cache {cache}: {reason}' in capsys.readouterr().out
    assert same(batches(ours), batches(make_data(config)))
    on_device(replace(config, data_on_device='always'))
    assert f'from {cache}' in loader_lines(capsys)[0]


def test_other_decoding_has_a_cache_of_its_own(root):
    config = quick_config(data_dir=root, no_aug=True)
    for options in ({}, dict(img_size=9), dict(interpolation='bicubic'), dict(exif_transpose=True),
                    dict(val_split_fraction=0.2), dict(val_split_fraction=0.2, seed=8)):
        on_device(replace(config, **options))
    names = [path.name for path in cache_folder().iterdir()]
    assert len(names) == 6 * 2 and all(name.startswith('data-') for name in names)


def test_pairs_of_multimnist_depend_on_the_seed(tmp_path):
    from .images import make_mnist
    config = quick_config(dataset='multimnist', data_dir=str(make_mnist(tmp_path / 'mnist')), no_aug=True)
    for seed in (1, 2, 1):
        seeded = replace(config, seed=seed)
        assert same(batches(on_device(seeded)), batches(make_data(seeded)))


def test_a_cache_that_cannot_be_written(root, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TIMM_SPINAL_CACHE', str(tmp_path / 'file'))
    assert len(batches(on_device(quick_config(data_dir=root)))) == 6
    assert 'not cached: ' in loader_lines(capsys)[0]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv('TIMM_SPINAL_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path / 'timm_spinal' / 'decoded'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_folder() == Path.home() / '.cache' / 'timm_spinal' / 'decoded'


def test_logits_of_a_teacher_come_with_the_images(root):
    """Those of the image itself, or of the one that took the place of an image that cannot be read."""
    (Path(root) / 'train' / 'ant' / '5.png').write_bytes(b'none')
    data = on_device(quick_config(data_dir=root, no_aug=True, val_split_fraction=0.2, skip_unreadable=True))
    dataset = data.train_loader.dataset
    dataset.rows = torch.arange(22.)[:, None].expand(-1, 3)
    data.set_epoch(1)
    rows, places = torch.cat([rows for *_, rows in data.train_loader])[:, 0].tolist(), dataset._host_order.tolist()
    assert rows == [dataset.split.number(i) for i in places] and len(rows) == 20
    gone = next(i for i in range(len(dataset)) if dataset.split.describe(i).endswith('ant/5.png'))
    assert gone not in places and places.count(gone + 1) >= 2
