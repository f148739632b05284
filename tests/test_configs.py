"""Every file in configs/: it parses, it names a model that exists, and it says where it comes from."""
import re
from pathlib import Path

import pytest
import timm
import yaml

import timm_spinal
from timm_spinal.compare.sweep_file import read_sweep, size_control
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.named_datasets import NAMES, torch_split
from timm_spinal.training.parser import parse_config
from timm_spinal.training.regression import is_regression
from timm_spinal.training.splits import create_datasets
from timm_spinal.training.transforms import resolve_data, train_transform

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*.yaml'))
SWEEPS = sorted((Path(__file__).parents[1] / 'configs' / 'sweeps').glob('*.yaml'))
GENERAL = ('quickstart', 'finetune')  # no paper's recipe, and not of one model
# data sets that the papers report on, and models of theirs
COVERED = (
    'quickstart', 'mnist_', 'fashion_mnist_', 'kmnist_', 'qmnist_', 'emnist_letters_', 'emnist_digits_',
    'emnist_balanced_', 'cifar10_', 'cifar100_', 'stl10_', 'caltech101_', 'flowers102_', 'stanford_cars_',
    'fruits360_', 'birds_', 'multimnist_', 'svhn_', 'cinic10_', 'regression_',
)


def test_every_data_set_has_a_config():
    names = [path.stem for path in CONFIGS]
    assert not [data for data in COVERED if not any(name.startswith(data) for name in names)]
    assert {'fashion_mnist_vgg5_pspinal', 'fashion_mnist_vgg5_spinal', 'fashion_mnist_spinalcnn_a1',
            'fashion_mnist_spinalcnn_plain'} <= set(names)


def test_every_config_is_in_the_table_of_the_documentation():
    page = (Path(__file__).parents[1] / 'docs' / 'training.md').read_text(encoding='utf-8')
    table = page.partition('| `DATA` | `MODEL` |\n|---|---|\n')[2].partition('\n\n')[0]
    rows = [line.split('|') for line in table.splitlines()]
    listed = [f'{data}_{model}' for _, sets, models, _ in rows
              for data in re.findall('`(.+?)`', sets) for model in re.findall('`(.+?)`', models)]
    assert sorted([*listed, *GENERAL]) == [path.stem for path in CONFIGS]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_is_sound(path):
    config = parse_config(['--config', str(path)])
    timm_spinal.ensure_registered(config.model)
    assert timm.is_model(config.model) and (path.stem in GENERAL or path.stem.endswith('_' + config.model))
    defaults = TrainConfig()
    given = yaml.safe_load(path.read_text())
    assert not [key for key, value in given.items() if value == getattr(defaults, key)], 'only what differs'
    prefix, _, name = config.dataset.partition('/')
    if prefix == 'torch':
        assert name in NAMES
        splits = [config.train_split, config.test_split] + ([] if config.val_split_fraction else [config.val_split])
        assert all(torch_split(name, split) for split in splits if split)
    # no run chooses its epoch on the test split
    assert config.val_split_fraction or config.val_split != 'test'
    header = path.read_text().split('\n', 12)
    if path.stem not in GENERAL:
        assert all(any(line.startswith(f'# {word}:') for line in header) for word in ('Source', 'Reported', 'Differs'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_model_and_transform_can_be_made(path):
    config = parse_config(['--config', str(path)])
    timm_spinal.ensure_registered(config.model)
    kwargs = dict(config.model_kwargs, **({'in_chans': config.in_chans} if config.in_chans else {}))
    model = timm.create_model(config.model, num_classes=7, device='meta', **kwargs)
    if is_regression(config):
        return  # numbers have no transform
    data = resolve_data(config, model)
    assert data['input_size'][0] == model.in_chans and (data['crop_pct'] == 1. or path.stem == 'finetune')
    assert data['input_size'][1] in (28, 32) or config.img_size == data['input_size'][1] or path.stem == 'finetune'
    train_transform(config, data)


@pytest.mark.parametrize('path', SWEEPS, ids=lambda p: p.stem)
def test_sweep_is_sound(path):
    sweep = read_sweep(path)
    for name, config in sweep.configs.items():
        kwargs = dict(size_control(sweep, name, 7).model_kwargs)
        if config.in_chans:
            kwargs['in_chans'] = config.in_chans
        model = timm.create_model(config.model, num_classes=7, device='meta', **kwargs)
        data = resolve_data(config, model)
        assert data['input_size'][0] == model.in_chans and data['crop_pct'] == 1.
        train_transform(config, data)
        # capsule lengths are not logits
        assert (config.loss == 'margin') == (config.model.rpartition('_')[2] in ('caps', 'xnodr', 'xnidr'))


def test_quickstart_has_data_without_a_network():
    pytest.importorskip('sklearn')
    datasets = create_datasets(parse_config(['--config', str(CONFIGS[0].parent / 'quickstart.yaml')]))
    assert len(datasets.train) + len(datasets.eval) == 1797 and datasets.num_classes == 10


def test_a_config_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = parse_config(['--config', 'finetune', '--data-dir', 'mine'])
    assert named == parse_config(['--config', str(CONFIGS[0].parent / 'finetune.yaml'), '--data-dir', 'mine'])
    assert parse_config(['--config', 'quickstart']).dataset == 'digits'
    (tmp_path / 'finetune').write_text('epochs: 77\n')
    assert parse_config(['--config', 'finetune']).epochs == 77  # a file of one's own comes first


@pytest.mark.parametrize('name, near', [
    ('finetun', 'finetune'),
    ('nosuch/quickstart.yaml', 'quickstart'),
    ('..', ''),
    ('../configs/quickstart', 'quickstart'),
    ('sweeps/cifar10_heads', ''),
])
def test_a_config_that_is_nowhere(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f'config {name}: .*; give an existing YAML file to --config, or the name of a '
                                        f'file in configs/, such as {near}'):
        parse_config(['--config', name])
