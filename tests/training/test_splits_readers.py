"""timm's readers for Hugging Face datasets and WebDataset, where these packages are installed."""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from timm_spinal.errors import UserError

from .images import make_data, make_folder, quick_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    return make_folder(tmp_path / 'data', per_class=6)


def collect(data, epoch=0):
    data.set_epoch(epoch)
    return [(x.clone(), y.tolist()) for x, y in data.train_loader]


def test_hfds_is_exact_like_a_folder(folder, tmp_path):
    pytest.importorskip('datasets')
    config = quick_config(dataset=f'hfds/{folder}', data_dir=str(tmp_path / 'cache'))
    data = make_data(config)
    assert (data.train_size, data.eval_size, data.class_names, data.streamed) == (12, 12, ['ant', 'bee'], False)
    first, again = collect(data), collect(make_data(config))
    assert [y for _, y in first] == [y for _, y in again]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again))


def test_hfds_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip('datasets')
    with pytest.raises(UserError, match='cannot be opened') as error:
        make_data(quick_config(dataset=f'hfds/{tmp_path}/none'))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('workers', [0, 1])
def test_hfids_streams_an_epoch(folder, tmp_path, workers):
    pytest.importorskip('datasets')
    config = quick_config(
        dataset=f'hfids/{folder}', workers=workers, num_classes=2, train_num_samples=12, val_num_samples=12)
    data = make_data(config)
    assert data.streamed and data.train_size == 12
    targets = [y for _, batch in collect(data) for y in batch]
    assert sorted(targets) == [0] * 6 + [1] * 6
    assert sorted(y for _, batch in data.eval_loader for y in batch.tolist()) == [0] * 6 + [1] * 6


def write_tars(folder, root):
    """The two splits of a folder as WebDataset has them."""
    for split in ('train', 'validation'):
        with tarfile.open(root / f'{split}-0000.tar', 'w') as tar:
            for label, name in enumerate(('ant', 'bee')):
                for i in range(6):
                    for suffix, content in (
                        ('png', (folder / split / name / f'{i}.png').read_bytes()),
                        ('cls', str(label).encode()),
                    ):
                        info = tarfile.TarInfo(f'{name}{i}.{suffix}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


WDS = dict(
    dataset='wds/toy', train_split='train-0000.tar', val_split='validation-0000.tar', num_classes=2,
    train_num_samples=12, val_num_samples=12)


def test_wds_streams_an_epoch(folder, tmp_path):
    pytest.importorskip('webdataset')
    write_tars(folder, tmp_path)
    data = make_data(quick_config(data_dir=str(tmp_path), **WDS))
    targets = sorted(y for _, batch in collect(data) for y in batch)
    assert data.streamed and len(targets) == 12 and set(targets) <= {0, 1}
    assert sorted(y for _, batch in data.eval_loader for y in batch.tolist()) == [0] * 6 + [1] * 6


@pytest.mark.parametrize('reader, package', [('hfds', 'datasets'), ('hfids', 'datasets'), ('wds', 'webdataset')])
def test_grey_of_16_bits_is_scaled_by_every_reader(folder, tmp_path, reader, package):
    pytest.importorskip(package)
    for file in folder.rglob('*.png'):
        level = 8000 if file.parent.name == 'ant' else 40000
        Image.fromarray(np.full((12, 12), level, np.uint16)).save(file)
    if reader == 'wds':
        write_tars(folder, tmp_path)
        options = dict(WDS, data_dir=str(tmp_path))
    else:
        options = dict(dataset=f'{reader}/{folder}', data_dir=str(tmp_path / 'cache'), num_classes=2,
                       train_num_samples=12, val_num_samples=12)
    data = make_data(quick_config(**options, mean=[0.], std=[1.]))
    for images, labels in data.eval_loader:
        levels = torch.tensor([8000 >> 8, 40000 >> 8])[labels]
        assert torch.equal((images * 255).round(), levels.view(-1, 1, 1, 1).expand_as(images).float())
