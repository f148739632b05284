"""Pairs of digits: what they are made of, that splits share no digit, and where the files may lie."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, ValidateConfig
from timm_spinal.training.data import create_data
from timm_spinal.training.named_datasets import MultiMnist, open_digits, open_multimnist
from timm_spinal.training.splits import create_datasets
from timm_spinal.training.train import train
from timm_spinal.validate import validate

from .images import TinyModel, make_data, make_mnist, need_mnist, quick_config, write_idx


def noise(count=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % 10


def config_of(root, **options):
    return quick_config(dataset='multimnist', data_dir=str(root), **options)


# ---- a pair ----


def test_pair_is_the_clipped_sum_of_two_shifted_digits():
    images, labels = noise()
    pairs = MultiMnist(images, labels, 50, seed=3)
    clipped = 0
    for i in range(50):
        image, target = pairs[i]
        (a, b), ((ya, xa), (yb, xb)) = pairs.pair(i)
        whole = np.zeros((2, 36, 36), int)
        whole[0, ya:ya + 28, xa:xa + 28], whole[1, yb:yb + 28, xb:xb + 28] = images[a], images[b]
        assert image.mode == 'L' and np.array_equal(image, np.minimum(whole.sum(0), 255))
        assert labels[a] != labels[b] and target.dtype == np.float32
        assert target.nonzero()[0].tolist() == sorted([labels[a], labels[b]]) and target.sum() == 2
        clipped += int((whole.sum(0) > 255).sum())
    assert clipped > 1000


def test_shifts_and_digits_are_uniform():
    images, labels = noise()
    pairs = MultiMnist(images, labels, 12000, seed=1)
    drawn = [pairs.pair(i) for i in range(12000)]
    shifts = np.bincount(np.array([s for _, s in drawn]).ravel(), minlength=9)
    assert len(shifts) == 9 and np.abs(shifts / 48000 - 1 / 9).max() < 0.01
    first, second = np.array([digits for digits, _ in drawn]).T
    assert (np.bincount(first) == 400).all()  # every digit in turn
    assert np.abs(np.bincount(second, minlength=30) / 12000 - 1 / 30).max() < 0.01
    assert len({(a, b) for a, b in zip(first, second)}) == 30 * 27  # all others but those of the same class


def test_pair_depends_on_seed_and_index_only():
    images, labels = noise()
    short, long, other = (MultiMnist(images, labels, *args) for args in ((10, 5), (10 ** 9, 5), (10, 6)))
    for i in range(10):
        assert np.array_equal(short[i][0], long[i][0]) and np.array_equal(short[i][1], long[i][1])
    assert not any(np.array_equal(short[i][0], other[i][0]) for i in range(10))
    assert np.array_equal(long[10 ** 9 - 1][0], long[10 ** 9 - 1][0])
    for index in (-1, 10):
        with pytest.raises(IndexError):
            short[index]


# ---- splits and files ----


def digits_of(source):
    return {source.dataset.images[i].tobytes() for pair in range(len(source)) for i in source.dataset.pair(pair)[0]}


def test_splits_share_no_digit(tmp_path):
    datasets = create_datasets(config_of(make_mnist(tmp_path, 400, 100), test_split='test'))
    assert (len(datasets.train), len(datasets.eval), len(datasets.test)) == (360, 40, 100)
    seen = [digits_of(source) for source in (datasets.train, datasets.eval, datasets.test)]
    assert [len(s) for s in seen] == [360, 40, 100]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert datasets.num_classes == 10 and datasets.class_names == list('0123456789') and datasets.multi_label


def test_evaluation_pairs_do_not_follow_the_seed(tmp_path):
    make_mnist(tmp_path)
    first, second = (create_datasets(config_of(tmp_path, seed=seed)) for seed in (1, 2))
    assert np.array_equal(first.eval.read(0)[0], second.eval.read(0)[0])
    assert not np.array_equal(first.train.read(0)[0], second.train.read(0)[0])


def test_numbers_of_pairs(tmp_path):
    datasets = create_datasets(config_of(
        make_mnist(tmp_path), train_num_samples=100_000, val_num_samples=7, test_split='test'))
    assert (len(datasets.train), len(datasets.eval), len(datasets.test)) == (100_000, 7, 7)


@pytest.mark.parametrize('folder', ['', 'MNIST/raw', 'raw', 'mnist'])
@pytest.mark.parametrize('packed', [False, True])
def test_files_are_found(tmp_path, folder, packed):
    make_mnist(tmp_path / folder, packed=packed)
    assert len(open_multimnist(config_of(tmp_path), 'val').dataset.images) == 10
    assert len(open_multimnist(config_of(tmp_path), 'test')) == 20


def test_other_spelling_of_the_files(tmp_path):
    for path in make_mnist(tmp_path).iterdir():
        path.rename(path.with_name(path.name.replace('-idx', '.idx')))
    assert len(open_multimnist(config_of(tmp_path), 'test')) == 20


def truncate(root):
    path = root / 'train-images-idx3-ubyte'
    path.write_bytes(path.read_bytes()[:-1])


def spoil_gzip(root):
    (root / 'train-images-idx3-ubyte').unlink()
    (root / 'train-images-idx3-ubyte.gz').write_bytes(b'\x1f\x8b not packed')


@pytest.mark.parametrize('damage, options, words', [
    (lambda root: (root / 'train-labels-idx1-ubyte').unlink(), {}, 'no train-labels-idx1-ubyte (or .gz) in'),
    (lambda root: (root / 't10k-images-idx3-ubyte').unlink(), {'test_split': 'test'}, 'add --dataset-download'),
    (truncate, {}, 'train-images-idx3-ubyte cannot be read'),
    (spoil_gzip, {}, 'ubyte.gz cannot be read'),
    (lambda root: (root / 'train-images-idx3-ubyte').write_text('hello'), {}, 'not an idx file of bytes'),
    (lambda root: write_idx(root / 'train-images-idx3-ubyte', np.zeros((40, 27, 28))), {}, 'put the MNIST files there'),
    (lambda root: write_idx(root / 'train-labels-idx1-ubyte', np.arange(39)), {}, 'put the MNIST files there'),
    (lambda root: write_idx(root / 'train-labels-idx1-ubyte', np.arange(40)), {}, 'put the MNIST files there'),
    (lambda root: write_idx(root / 'train-labels-idx1-ubyte', np.zeros(40)), {}, 'of one class'),
    (lambda root: None, {'data_dir': ''}, 'give one with --data-dir'),
    (lambda root: None, {'val_split': 'extra'}, "no split 'extra'; it has train, validation and test"),
    (lambda root: None, {'val_split_fraction': 0.1}, 'its split validation has other digits'),
    (lambda root: None, {'num_classes': 12}, '--num-classes 12: dataset multimnist has 10'),
    (lambda root: None, {'num_classes': 9}, 'the data have 10 classes'),
])
def test_bad_input_is_one_line(tmp_path, damage, options, words):
    damage(make_mnist(tmp_path))
    with pytest.raises(UserError) as error:
        create_datasets(TrainConfig(**{**vars(config_of(tmp_path)), **options}))
    assert words in str(error.value) and '\n' not in str(error.value)


def test_download_is_torchvisions(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.raw_folder)
        make_mnist(Path(self.raw_folder))

    monkeypatch.setattr(torchvision.datasets.MNIST, 'download', download)
    for _ in range(2):  # what is there is not fetched again
        assert len(create_datasets(config_of(tmp_path, dataset_download=True)).train) == 30
    assert asked == [str(tmp_path / 'MNIST' / 'raw')]


def test_real_digits(tmp_path):
    source = open_multimnist(config_of(need_mnist(tmp_path)), 'train', training=True)
    assert len(source) == 54_001 and source.dataset.labels[:3].tolist() == [5, 0, 4]
    image, target = source.read(0)
    assert target[5] == 1 and target.sum() == 2 and image.size == (36, 36)
    held_out = open_multimnist(config_of(tmp_path), 'validation').dataset.images
    digits = {digit.tobytes() for digit in source.dataset.images}
    assert len(digits) == 54_001 and not any(digit.tobytes() in digits for digit in held_out)


# ---- batches and runs ----


def test_batches_hold_memberships(tmp_path):
    data = make_data(config_of(make_mnist(tmp_path), hflip=0.))
    data.set_epoch(0)
    images, targets = next(iter(data.train_loader))
    assert images.shape == (4, 3, 8, 8) and targets.shape == (4, 10) and targets.dtype == torch.float32
    assert (targets.sum(1) == 2).all() and data.multi_label
    assert data.eval_loader.dataset[0, None][1] == create_datasets(config_of(tmp_path)).eval.read(0)[1].tolist()


def test_mixup_mixes_memberships(tmp_path):
    config = config_of(make_mnist(tmp_path), mixup=0.8, smoothing=0.2)
    data = create_data(config, TinyModel, create_datasets(config))
    _, mixed = data.mixup(torch.rand(4, 3, 8, 8), torch.eye(10)[:4] + torch.eye(10)[1:5])
    assert torch.allclose(mixed.sum(1), torch.full((4,), 2 * 0.8 + 10 * 0.1))


def tiny_run(tmp_path, **options):
    defaults = dict(
        dataset='multimnist', data_dir=str(make_mnist(tmp_path / 'mnist', 60, 20)), model='spinalcnn_a1', img_size=36,
        batch_size=8, workers=0, epochs=2, warmup_epochs=0, lr=0.01, hflip=0., smoothing=0., output=str(tmp_path),
        experiment='run', test_split='test', log_interval=100)
    return TrainConfig(**{**defaults, **options})


def test_run_is_chosen_by_exact_pairs_and_validates_the_same(tmp_path):
    result = train(tiny_run(tmp_path, loss='bce'))
    folder = tmp_path / 'run'
    assert result == json.loads((folder / 'result.json').read_text()) and 'top1' not in result
    assert result['best_metric'] == 'exact' and result['test_images'] == 20
    header, *rows = (folder / 'summary.csv').read_text().splitlines()
    assert 'eval_exact,eval_digit,eval_top2' in header and len(rows) == 2

    row, = validate(ValidateConfig(
        checkpoint=str(folder), dataset='multimnist', data_dir=str(tmp_path / 'mnist'), val_split='test', img_size=36,
        workers=0))
    for name in ('exact', 'digit', 'top2', 'loss'):
        assert row[name] == pytest.approx(result[f'test_{name}'], rel=1e-5)
    assert row['exact_err'] == 100 - row['exact'] and row['images'] == 20

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    pairs = open_multimnist(tiny_run(tmp_path), 'test')
    found = []
    for i in range(20):
        image, target = pairs.read(i)
        pixels = torch.from_numpy(np.array(image, np.float32) / 255 - 0.1307) / 0.3081
        with torch.no_grad():
            answer = model(pixels[None, None])[0].argsort(descending=True)[:2].tolist()
        found.append(len(set(answer) & set(target.nonzero()[0].tolist())))
    assert result['test_exact'] == pytest.approx(100 * np.mean(np.equal(found, 2)))
    assert result['test_digit'] == pytest.approx(100 * np.mean(found) / 2)


@pytest.mark.parametrize('options, words', [
    (dict(loss='ce'), '--loss ce: needs images with one class'),
    (dict(eval_metric='top5'), '--eval-metric top5: is not measured for images with two classes; use loss, exact'),
    (dict(kd_model_name='spinalcnn_a1'), '--kd-model-name spinalcnn_a1: distillation needs images with one class'),
    (dict(test_split='tset'), "no split 'tset'"),
])
def test_bad_runs_write_nothing(tmp_path, options, words):
    with pytest.raises(UserError, match=words) as error:
        train(tiny_run(tmp_path, **options))
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_digits_are_split_once_and_for_all():
    pytest.importorskip('sklearn')
    train, validation = open_digits('train'), open_digits('validation')
    assert (len(train), len(validation)) == (1438, 359)
    assert sorted([*train.indices, *validation.indices]) == list(range(1797))
    assert np.bincount(validation.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert validation.class_names == list('0123456789')


def test_a_digit_is_a_grey_image_of_sklearns_values():
    datasets = pytest.importorskip('sklearn.datasets')
    train = open_digits('train')
    image, label = train.read(7)
    raw = datasets.load_digits()
    index = train.indices[7]
    assert image.mode == 'L' and image.size == (8, 8) and label == raw.target[index] == train.labels[7]
    assert np.abs(np.asarray(image) / 255 * 16 - raw.images[index]).max() < 0.04


def test_unknown_split_and_missing_package_say_what_to_do(monkeypatch):
    with pytest.raises(UserError, match='train and validation'):
        open_digits('test')
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match=r'pip install .timm-spinal\[digits\]'):
        open_digits('train')
