"""Every kind of source, and what it says when the data are not there."""
import io
import shutil
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets as tv

from timm_spinal.errors import UserError
from timm_spinal.training.named_datasets import TORCH_SETS, torch_labels, torch_split
from timm_spinal.training.splits import create_datasets, open_split

from .images import make_folder, make_split, need_cifar10, need_mnist, quick_config, write_idx


def one_line(error):
    message = str(error.value)
    assert '\n' not in message
    return message


def pack(folder, path):
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, arcname=folder.name)


# ---- folders and tars ----


def test_folder_splits_are_found_by_name_and_synonym(tmp_path):
    root = make_folder(tmp_path / 'data', splits=('train', 'val', 'test'))
    for split, name in (('train', 'train'), ('validation', 'val'), ('test', 'test')):
        source = open_split(quick_config(data_dir=str(root)), split)
        assert source.name == str(root / name) and len(source) == 12
        assert source.class_names == ['ant', 'bee'] and source.labels.tolist() == [0] * 6 + [1] * 6


def test_tar_holds_the_same_images_as_its_folder(tmp_path):
    root = make_folder(tmp_path / 'data')
    for split in ('train', 'validation'):
        pack(root / split, tmp_path / f'{split}.tar')
    shutil.rmtree(root)
    shutil.rmtree(tmp_path / 'data', ignore_errors=True)
    datasets = create_datasets(quick_config(data_dir=str(tmp_path)))
    make_folder(root)
    folders = create_datasets(quick_config(data_dir=str(root)))
    assert datasets.class_names == folders.class_names == ['ant', 'bee']
    for i in (0, 7):
        (image, label), (expected, expected_label) = datasets.eval.read(i), folders.eval.read(i)
        assert label == expected_label and np.array_equal(image, expected)


def test_classes_without_splits_are_cut_when_asked(tmp_path):
    root = make_split(tmp_path / 'flowers', per_class=10)
    datasets = create_datasets(quick_config(data_dir=str(root), val_split_fraction=0.2))
    assert (len(datasets.train), len(datasets.eval)) == (16, 4)
    assert datasets.eval.labels.tolist() == [0, 0, 1, 1]
    files = {datasets.train.describe(i) for i in range(16)} | {datasets.eval.describe(i) for i in range(4)}
    assert len(files) == 20


def test_evaluation_classes_get_their_training_indices(tmp_path):
    make_split(tmp_path / 'train', classes=('ant', 'bee', 'cat'))
    make_split(tmp_path / 'val', classes=('cat',))
    datasets = create_datasets(quick_config(data_dir=str(tmp_path)))
    assert datasets.num_classes == 3 and set(datasets.eval.labels.tolist()) == {2}
    assert datasets.eval.read(0)[1] == 2


def test_class_map_orders_the_classes(tmp_path):
    root = make_folder(tmp_path / 'data')
    (tmp_path / 'map.txt').write_text('bee\nant\n')
    datasets = create_datasets(quick_config(data_dir=str(root), class_map=str(tmp_path / 'map.txt')))
    assert datasets.class_names == ['bee', 'ant'] and datasets.train.labels.tolist() == [1] * 6 + [0] * 6


@pytest.mark.parametrize('make, options, words', [
    (lambda root: None, {}, 'does not exist; check --data-dir'),
    (lambda root: root.mkdir(), {}, 'is empty'),
    (lambda root: root.write_text('x'), {}, 'neither a folder nor a .tar'),
    (lambda root: make_folder(root, splits=('train', 'test')), {}, 'it contains test, train'),
    (lambda root: make_split(root), {}, "no split 'train' in it (it contains ant, bee)"),
    (lambda root: make_split(root), {}, '--val-split-fraction'),
    (lambda root: make_folder(root, splits=('val', 'test')), {'val_split_fraction': 0.1}, 'name one of them'),
    (lambda root: make_folder(root, splits=('train', 'validation'), classes=()), {}, 'does not exist'),
    (lambda root: [(root / s / 'ant').mkdir(parents=True) for s in ('train', 'val')], {}, 'has no images in'),
    (lambda root: make_folder(root), {'class_map': 'no_such.txt'}, 'no_such.txt: does not exist'),
    (lambda root: (make_split(root / 'train'), make_split(root / 'val', classes=('ant', 'wasp'))), {},
     'has 1 that'),
    (lambda root: (make_split(root / 'train'), make_split(root / 'val', classes=('ant', 'wasp'))), {}, '(wasp)'),
    (lambda root: make_folder(root, classes=('a', 'b', 'c')), {'num_classes': 2}, 'the data have 3 classes'),
])
def test_bad_folders_say_what_to_do(tmp_path, make, options, words):
    make(tmp_path / 'data')
    with pytest.raises(UserError) as error:
        create_datasets(quick_config(data_dir=str(tmp_path / 'data'), **options))
    assert words in one_line(error)


def test_no_data_at_all():
    with pytest.raises(UserError, match='--data-dir') as error:
        create_datasets(quick_config())
    one_line(error)


def test_bad_tars_say_what_to_do(tmp_path):
    (tmp_path / 'train.tar').write_bytes(b'not a tar')
    with pytest.raises(UserError, match='train.tar') as error:
        create_datasets(quick_config(data_dir=str(tmp_path)))
    one_line(error)
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        info = tarfile.TarInfo('notes.txt')
        info.size = 2
        tar.addfile(info, io.BytesIO(b'hi'))
    with pytest.raises(UserError, match='has no images in folders of classes'):
        create_datasets(quick_config(data_dir=str(tmp_path)))
    with pytest.raises(UserError, match='single tar file'):
        create_datasets(quick_config(data_dir=str(tmp_path / 'train.tar')))
    with pytest.raises(UserError, match='missing.tar: does not exist'):
        create_datasets(quick_config(data_dir=str(tmp_path / 'missing.tar')))


def test_more_classes_than_the_data_have_is_only_a_warning(tmp_path, caplog):
    root = make_folder(tmp_path / 'data')
    datasets = create_datasets(quick_config(data_dir=str(root), num_classes=5))
    assert datasets.num_classes == 5 and 'the rest stays unused' in caplog.text


# ---- names ----


@pytest.mark.parametrize('name, words', [
    ('digit', 'did you mean digits?'),
    ('multi_mnist', 'did you mean multimnist?'),
    ('torch/fashionmnist', 'did you mean torch/fashion_mnist?'),
    ('torch/emnist', 'did you mean torch/emnist_'),
    ('mnist', 'did you mean torch/mnist?'),
    ('foo/bar', 'hfds/NAME'),
])
def test_unknown_names_get_the_nearest(name, words):
    with pytest.raises(UserError) as error:
        create_datasets(quick_config(dataset=name, data_dir='x'))
    assert words in one_line(error)


@pytest.mark.parametrize('prefix, package', [('hfds', 'datasets'), ('wds', 'webdataset'), ('tfds', 'tensorflow')])
def test_readers_whose_package_is_missing_name_it(prefix, package):
    with pytest.raises(UserError) as error:
        create_datasets(quick_config(dataset=f'{prefix}/none', data_dir='/none', num_classes=2))
    # with the package installed it is the data that are missing
    assert f'pip install {package}' in one_line(error) or 'cannot be opened' in one_line(error)


# ---- torchvision ----


def test_torch_splits_go_by_the_names_of_the_set():
    assert torch_split('mnist', 'train') == 'train'
    assert torch_split('mnist', 'validation') == 'test'
    assert torch_split('flowers102', 'validation') == 'val'
    assert torch_split('oxford_iiit_pet', 'train') == 'trainval'
    assert torch_split('svhn', 'extra') == 'extra'
    assert torch_split('caltech101', 'train') == 'train'
    for name, split in (('caltech101', 'validation'), ('stl10', 'unlabelled'), ('cifar10', 'tset')):
        with pytest.raises(UserError, match=name):
            torch_split(name, split)


def test_every_row_names_a_torchvision_class():
    assert all(hasattr(tv, row.cls) for row in TORCH_SETS.values())


def test_missing_and_undownloadable_sets_say_what_to_do(tmp_path, monkeypatch):
    config = dict(dataset='torch/emnist_letters', data_dir=str(tmp_path))
    with pytest.raises(UserError, match='--dataset-download') as error:
        create_datasets(quick_config(**config))
    one_line(error)
    with pytest.raises(UserError, match='--data-dir') as error:
        create_datasets(quick_config(dataset='torch/mnist'))
    one_line(error)

    def offline(*args, **kwargs):
        raise URLError('Name or service not known')

    monkeypatch.setattr('urllib.request.urlopen', offline)
    with pytest.raises(UserError, match='check the network') as error:
        create_datasets(quick_config(**config, dataset_download=True))
    one_line(error)


def test_emnist_letters_count_from_zero(tmp_path):
    raw = tmp_path / 'EMNIST' / 'raw'
    raw.mkdir(parents=True)
    labels = np.arange(1, 27)
    for kind in ('train', 'test'):
        write_idx(raw / f'emnist-letters-{kind}-images-idx3-ubyte', np.arange(26 * 784).reshape(26, 28, 28) % 251)
        write_idx(raw / f'emnist-letters-{kind}-labels-idx1-ubyte', labels)
    datasets = create_datasets(quick_config(dataset='torch/emnist_letters', data_dir=str(tmp_path)))
    assert datasets.num_classes == 26 and datasets.class_names == list('abcdefghijklmnopqrstuvwxyz')
    assert datasets.train.labels.tolist() == list(range(26)) == [datasets.train.read(i)[1] for i in range(26)]


def test_labels_are_found_wherever_torchvision_keeps_them():
    class Set:
        pass

    qmnist, cars, nothing = Set(), Set(), Set()
    qmnist.targets = np.array([[3, 9, 9], [1, 9, 9]])
    cars._samples = [('a.jpg', 4), ('b.jpg', 2)]
    assert torch_labels(qmnist).tolist() == [3, 1] and torch_labels(cars).tolist() == [4, 2]
    assert torch_labels(nothing) is None


def test_mnist_is_mnist(tmp_path, caplog):
    config = quick_config(dataset='torch/mnist', data_dir=str(need_mnist(tmp_path)))
    datasets = create_datasets(config)
    assert (len(datasets.train), len(datasets.eval), datasets.num_classes) == (60000, 10000, 10)
    assert datasets.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    image, label = datasets.eval.read(0)
    assert (image.mode, image.size, label) == ('L', (28, 28), 7)
    assert 'the test split chooses the best epoch' in caplog.text


def test_a_validation_split_keeps_the_test_set_for_the_end(tmp_path, caplog):
    config = quick_config(
        dataset='torch/mnist', data_dir=str(need_mnist(tmp_path)), val_split_fraction=0.1, test_split='test')
    datasets = create_datasets(config)
    assert len(datasets.train) + len(datasets.eval) == 60000 and len(datasets.test) == 10000
    assert np.intersect1d(datasets.train.indices, datasets.eval.indices).size == 0
    counts = np.bincount(datasets.eval.labels)
    assert counts.tolist() == np.round(0.1 * np.bincount(create_labels(datasets))).tolist()
    assert 'chooses' not in caplog.text


def create_labels(datasets):
    return np.concatenate([datasets.train.labels, datasets.eval.labels])


@pytest.mark.slow
def test_cifar10_tars_are_read():
    config = quick_config(data_dir=str(need_cifar10()), val_split='test')
    datasets = create_datasets(config)
    assert datasets.num_classes == 10 and datasets.class_names[0] == 'airplane'
    assert (len(datasets.train), len(datasets.eval)) == (50000, 10000)
    image, label = datasets.eval.read(0)
    assert image.size == (32, 32) and label == 0
