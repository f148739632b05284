import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.training.checkpoint import find_checkpoints
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.run import train
from timm_spinal.training.validation import validate

from .training.runs import small_config


@pytest.fixture
def trained(tmp_path):
    config = small_config(tmp_path, epochs=2, model_ema=True, model_ema_decay=0.5)
    return config, train(config)


def options(config, **kwargs):
    return ValidateConfig(**{**dict(data_dir=config.data_dir, batch_size=5, workers=0), **kwargs})


def test_run_folder_gives_the_numbers_of_the_run(trained, tmp_path):
    config, result = trained
    for where in (dict(checkpoint=str(tmp_path / 'run')), dict(model=f'local-dir:{tmp_path / "run"}', pretrained=True)):
        row, = validate(options(config, **where))
        assert row['top1'] == pytest.approx(result['top1']) and row['loss'] == pytest.approx(result['loss'], rel=1e-6)
        assert row['images'] == 22 and row['top1_err'] == pytest.approx(100 - result['top1'])
        assert row['param_count'] == round(result['params'] / 1e6, 2) and row['img_size'] == 32


def test_checkpoint_and_its_average(trained, tmp_path):
    config, _ = trained
    last = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))[-1]
    newest = find_checkpoints(tmp_path / 'run' / 'last')[0]
    plain, = validate(options(config, checkpoint=str(newest)))
    average, = validate(options(config, checkpoint=str(tmp_path / 'run'), use_ema=True))
    assert plain['loss'] == pytest.approx(float(last['eval_loss']), rel=1e-6)
    assert average['loss'] == pytest.approx(float(last['ema_loss']), rel=1e-6)


def test_weights_file(trained, tmp_path):
    config, result = trained
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=load_file(tmp_path / 'run' / 'model.safetensors')), path)
    row, = validate(options(config, checkpoint=str(path), model=config.model, num_classes=2, img_size=32))
    assert row['top1'] == pytest.approx(result['top1'])
    with pytest.raises(UserError, match='the weights are not of test_resnet'):
        validate(options(config, checkpoint=str(path), model='test_resnet', num_classes=2))


def test_several_at_once_go_on_after_an_error(trained, tmp_path, capsys):
    config, result = trained
    train(replace(config, experiment='run2', epochs=1, model='test_resnet'))
    (tmp_path / 'run3').mkdir()
    argv = ['validate', '--checkpoint', str(tmp_path / 'run*'), '--data-dir', config.data_dir, '-j', '0']
    for suffix in ('csv', 'json'):
        assert main([*argv, '--results-file', str(tmp_path / f'all.{suffix}')]) == 2
    rows = list(csv.DictReader((tmp_path / 'all.csv').open()))
    assert [row['model'] for row in rows] == [str(tmp_path / name) for name in ('run', 'run2', 'run3')]
    assert float(rows[0]['top1']) == pytest.approx(result['top1'])
    assert 'neither a run folder nor a checkpoint' in rows[2]['error'] and rows[0]['error'] == ''
    assert [row['model'] for row in json.loads((tmp_path / 'all.json').read_text())] == [row['model'] for row in rows]
    assert 'top-1' in capsys.readouterr().out


def test_wildcard_of_models(trained, capsys):
    config, _ = trained
    rows = validate(options(config, model='test_efficientnet_[gl]n', num_classes=2, img_size=32))
    assert [row['model'] for row in rows] == ['test_efficientnet_gn', 'test_efficientnet_ln']
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize('kwargs, text', [
    (dict(checkpoint='/nowhere'), 'checkpoint /nowhere: no such file or folder'),
    (dict(checkpoint='/nowhere/*'), r'checkpoint /nowhere/\*: nothing there matches'),
    (dict(model='nothing_*'), r"model 'nothing_\*': no model matches"),
    (dict(results_file='out.xls'), 'results_file out.xls: unknown format'),
    (dict(model='test_vit', img_size=32), 'classes: .* has 2, the model 1000'),
])
def test_errors(tmp_path, kwargs, text):
    with pytest.raises(UserError, match=text):
        validate(options(small_config(tmp_path), **kwargs))


def test_damaged_checkpoint_is_refused(trained, tmp_path):
    config, _ = trained
    newest = find_checkpoints(tmp_path / 'run' / 'last')[0]
    (newest / 'model.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='is damaged: model.safetensors has 0 bytes'):
        validate(options(config, checkpoint=str(newest)))


def test_other_classes_are_refused(trained, tmp_path):
    config, _ = trained
    for split in ('train', 'validation'):
        (tmp_path / 'images' / split / 'ant').rename(tmp_path / 'images' / split / 'cat')
    with pytest.raises(UserError, match="other classes than the data have .'ant' is 'bee' there."):
        validate(options(config, checkpoint=str(tmp_path / 'run')))
