"""The loaders: exactness of batches, sizes, mixing, and what they say to settings that cannot work."""
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from timm_spinal.errors import UserError
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.data import count_skipped, create_data, create_eval_loader
from timm_spinal.training.splits import create_datasets

from .images import TinyModel, make_data, make_folder, make_split, quick_config

AUGMENTED = dict(aa='rand-m9-mstd0.5', reprob=0.5, perspective=0.5, rotation=10.)


@pytest.fixture
def root(tmp_path):
    return str(make_folder(tmp_path / 'data', per_class=11))


def batches(data, epoch, loader=None):
    data.set_epoch(epoch)
    return [(x.clone(), y.clone()) for x, y in loader or data.train_loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, p) and torch.equal(y, q) for (x, y), (p, q) in zip(a, b))


def test_batches_do_not_depend_on_the_number_of_workers(root):
    alone = make_data(quick_config(data_dir=root, **AUGMENTED))
    helped = make_data(quick_config(data_dir=root, workers=2, **AUGMENTED))
    for epoch in (0, 1, 0):  # the workers live through all of them
        assert same(batches(alone, epoch), batches(helped, epoch))
    assert not same(batches(alone, 0), batches(alone, 1))


def test_seed_decides_order_and_augmentation(root):
    config = quick_config(data_dir=root, **AUGMENTED)
    assert same(batches(make_data(config), 3), batches(make_data(config, seed=config.seed), 3))
    assert not same(batches(make_data(config), 3), batches(make_data(config, seed=9), 3))


@pytest.mark.parametrize('workers', [0, 2])
def test_prepared_and_skipped_loaders_give_the_same_batches(root, workers):
    config = quick_config(data_dir=root, workers=workers, **AUGMENTED)
    expected = batches(make_data(config), 2)
    data = make_data(config)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(data.train_loader)
    batches(data, 0, loader)  # accelerate counts its own epochs, which must not matter
    assert same(batches(data, 2, loader), expected)
    # as a resumed run does it: new objects, and the first batches skipped
    fresh = make_data(config)
    resumed = accelerator.skip_first_batches(accelerator.prepare(fresh.train_loader), 2)
    assert same(batches(fresh, 2, resumed), expected[2:])


def test_two_processes_share_the_batches_of_one(root):
    config = quick_config(data_dir=root, **AUGMENTED)
    alone = batches(make_data(config), 1)
    shares = []
    for index in range(2):
        data = make_data(config, num_processes=2)
        loader = prepare_data_loader(data.train_loader, num_processes=2, process_index=index, put_on_device=False)
        shares.append(batches(data, 1, loader))
    assert len(alone) == 6 and [len(s) for s in shares] == [3, 3]
    assert same([share[i] for i in range(3) for share in shares], alone)


@pytest.mark.slow
def test_another_process_sees_the_same_batches(root):
    code = f'''
import torch
from tests.training.images import make_data, quick_config
data = make_data(quick_config(data_dir={root!r}, **{AUGMENTED!r}))
data.set_epoch(1)
print(repr(sum(x.double().sum().item() for x, _ in data.train_loader)))
print([y.tolist() for _, y in data.train_loader])
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    here = batches(make_data(quick_config(data_dir=root, **AUGMENTED)), 1)
    assert float(out[0]) == sum(x.double().sum().item() for x, _ in here)
    assert eval(out[1]) == [y.tolist() for _, y in here]


def test_iterating_leaves_the_global_stream_alone(root):
    data = make_data(quick_config(data_dir=root, **AUGMENTED))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in range(2):
        list(data.train_loader), list(data.eval_loader)
    assert torch.equal(torch.rand(3), expected)


def test_repeats_of_an_image_are_augmented_differently(root):
    data = make_data(quick_config(data_dir=root, batch_size=2, aug_repeats=2, hflip=0.5))
    for images, targets in batches(data, 0):
        assert targets[0] == targets[1] and not torch.equal(images[0], images[1])
    assert len(data.train_loader) == 11


def test_sizes_classes_and_full_batches(root):
    data = make_data(quick_config(data_dir=root, batch_size=5, validation_batch_size=8))
    assert (data.train_size, data.eval_size, data.test_size, data.test_loader) == (22, 22, 0, None)
    assert [len(y) for _, y in data.train_loader] == [5] * 5  # the rest of two is filled up with three seen before
    assert [len(y) for _, y in data.eval_loader] == [8, 8, 6]
    assert torch.cat([y for _, y in data.eval_loader]).tolist() == [0] * 11 + [1] * 11
    assert (data.num_classes, data.class_names, data.mixup, data.streamed) == (2, ['ant', 'bee'], None, False)
    assert data.data_config['input_size'] == (3, 8, 8)


def test_test_split_has_its_own_loader(tmp_path):
    root = make_folder(tmp_path / 'd', splits=('train', 'val', 'test'))
    data = make_data(quick_config(data_dir=str(root), test_split='test'))
    assert data.test_size == 12 and sum(len(y) for _, y in data.test_loader) == 12


def test_mixup_is_timms_and_reads_the_options(root):
    mixup = make_data(quick_config(data_dir=root, mixup=0.8, cutmix=1., mixup_mode='elem', smoothing=0.2)).mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mode, mixup.label_smoothing) == (0.8, 1., 'elem', 0.2)
    assert mixup.num_classes == 2
    _, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    assert targets.shape == (4, 2) and torch.allclose(targets.sum(1), torch.ones(4))
    assert make_data(quick_config(data_dir=root, cutmix_minmax=[0.2, 0.8])).mixup.cutmix_minmax == [0.2, 0.8]


def test_unreadable_images_are_named_or_skipped_and_counted(tmp_path):
    root = make_folder(tmp_path / 'd', per_class=4)
    for path in (root / 'train' / 'ant' / '2.png', root / 'validation' / 'bee' / '0.png'):
        path.write_bytes(b'no image')
    config = quick_config(data_dir=str(root))
    for loader in (lambda d: d.train_loader, lambda d: d.eval_loader):
        with pytest.raises(UserError, match='[02].png cannot be read') as error:
            list(loader(make_data(config)))
        assert '\n' not in str(error.value)
    data = make_data(quick_config(data_dir=str(root), workers=2, skip_unreadable=True))
    assert data.skipped() == 0
    assert all((y >= 0).all() for _, y in data.train_loader)
    assert torch.cat([y for _, y in data.eval_loader]).tolist() == [0, 0, 0, 0, -1, 1, 1, 1]
    assert data.skipped() == 2 and count_skipped(data.eval_loader) == 1


@pytest.mark.parametrize('options, kwargs, words', [
    (dict(batch_size=23), {}, 'is more than the 22 images of an epoch; use --batch-size 22'),
    (dict(batch_size=12), dict(num_processes=2), 'use --batch-size 11'),
    (dict(batch_size=3, mixup=0.2), {}, 'even'),
    (dict(batch_size=3, cutmix_minmax=[0.2, 0.8]), {}, 'even'),
])
def test_batch_sizes_that_cannot_work(root, options, kwargs, words):
    with pytest.raises(UserError) as error:
        make_data(quick_config(data_dir=root, **options), **kwargs)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_epoch_repeats_lengthen_the_epoch(root):
    assert len(make_data(quick_config(data_dir=root, batch_size=44, epoch_repeats=2.)).train_loader) == 1


def test_small_data_lose_no_image_in_any_number_of_processes(root):
    for processes in (1, 2, 3):
        data = make_data(quick_config(data_dir=root, batch_size=4), num_processes=processes)
        seen = [index for _ in range(2) for index, _ in data.train_loader.sampler]
        assert set(seen) == set(range(22)) and len(seen) // 2 % (4 * processes) == 0


def test_few_images_are_seen_as_often_as_the_least_updates_take(root):
    config = quick_config(data_dir=root, batch_size=4, epochs=3, min_updates=25)
    assert len(make_data(config).train_loader) == 9  # 9 updates an epoch are 27 in all
    assert len(make_data(config, accum=2).train_loader) == 18
    assert len(make_data(replace(config, min_updates=18)).train_loader) == 6  # as without it


def test_eval_loader_for_validation(root, tmp_path):
    config = ValidateConfig(data_dir=root, workers=0, batch_size=8)
    datasets = create_datasets(config, train=False)
    assert datasets.train is None
    loader, data_config = create_eval_loader(config, TinyModel, datasets)
    assert sum(len(y) for _, y in loader) == 22 and data_config['crop_pct'] == 1.
    make_split(tmp_path / 'few' / 'val', classes=('bee',))
    few = ValidateConfig(data_dir=str(tmp_path / 'few'), workers=0)
    with pytest.raises(UserError, match='has 1 classes, the model has 2'):
        create_eval_loader(few, TinyModel, create_datasets(few, train=False))


def test_held_out_part_is_the_same_in_validation(tmp_path):
    root = make_split(tmp_path / 'flat', per_class=10)
    options = dict(data_dir=str(root), val_split_fraction=0.3, seed=7)
    trained = create_datasets(quick_config(**options))
    validated = create_datasets(ValidateConfig(**options), train=False)
    assert validated.train is None and validated.eval.indices.tolist() == trained.eval.indices.tolist()


def test_streams_are_for_one_process(root):
    datasets = create_datasets(quick_config(data_dir=root))
    datasets.train.streamed = True
    with pytest.raises(UserError, match='one process only'):
        create_data(quick_config(data_dir=root), TinyModel, datasets, num_processes=2)


def test_turned_images_are_upright_when_asked_for(tmp_path):
    root = make_folder(tmp_path, per_class=2, size=8)
    tags = Image.Exif()
    tags[0x112] = 6
    for file in root.rglob('*.png'):
        Image.open(file).save(file, exif=tags)
    batches = {}
    for upright in (False, True):
        data = make_data(quick_config(
            data_dir=str(root), exif_transpose=upright, no_aug=True, batch_size=2, mean=[0.], std=[1.]))
        data.set_epoch(0)
        batches[upright] = next(iter(data.train_loader))[0], next(iter(data.eval_loader))[0]
    for stored, shown in zip(batches[False], batches[True]):
        assert torch.equal(shown, stored.rot90(-1, (2, 3))) and not torch.equal(shown, stored)
