"""Files of weights in runs, validation and comparisons: what is kept, what is said, what is refused."""
import json
import os
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_spinal.cli import main
from timm_spinal.compare.frozen import compare_frozen
from timm_spinal.compare.options import FrozenConfig
from timm_spinal.errors import UserError
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.model import create_model
from timm_spinal.training.train import train
from timm_spinal.validate import validate

from .images import make_folder
from .runs import assert_same_state, command, resumed, small_config


@pytest.fixture
def finished(tmp_path):
    """A run of test_resnet on two classes: config, result, weights."""
    config = small_config(tmp_path, model='test_resnet', epochs=1, drop=0.)
    return config, train(config), str(tmp_path / 'run' / 'model.safetensors')


def validation(config, **options):
    return ValidateConfig(**{**dict(data_dir=config.data_dir, model='test_resnet', img_size=32, workers=0), **options})


def test_validation_keeps_the_classifier(finished, tmp_path, capsys):
    config, result, file = finished
    torch.save(dict(model={f'module.{k}': v for k, v in load_file(file).items()}), tmp_path / 'saved.pth')
    for options in (dict(pretrained_path=file), dict(initial_checkpoint=file), dict(checkpoint=file),
                    dict(pretrained_path=str(tmp_path / 'saved.pth')), dict(checkpoint=str(tmp_path / 'saved.pth'))):
        row, = validate(validation(config, num_classes=2, **options))
        assert row['loss'] == pytest.approx(result['loss'], rel=1e-6)
        assert f'weights {next(iter(options.values()))}: 92 tensors loaded, none left out, none new' in \
            capsys.readouterr().out


@pytest.mark.parametrize('options, message', [
    (dict(pretrained_path='FILE'), 'is for 2 classes; the model has 1000 classes and would be measured with a random '
     'one .fc.weight, fc.bias.; give --num-classes 2'),
    (dict(pretrained_path='FILE', num_classes=3), 'is for 2 classes; the model has 3 .* give --num-classes 2'),
    (dict(pretrained_path='FILE', num_classes=2, model='test_resnet_spinal'), 'the classifier in it is missing or of'),
    (dict(model='local-dir:RUN', num_classes=3), 'the classifier in it is for 2 classes; .* give --num-classes 2'),
    (dict(checkpoint='FILE', num_classes=3), 'checkpoint .*: the weights are not of test_resnet: .* mismatch: fc.w'),
    (dict(checkpoint='FILE', num_classes=2, model='test_vit'), 'checkpoint .*: the weights are not of test_vit: they'),
    (dict(checkpoint='FILE', num_classes=2, use_ema=True), 'checkpoint .*: it has no moving average'),
    (dict(checkpoint='FILE', pretrained_path='FILE'), '--checkpoint: names the weights already'),
    (dict(initial_checkpoint='FILE', pretrained_path='FILE'), '--pretrained-path and --initial-checkpoint: the second'),
])
def test_validation_draws_no_classifier(finished, options, message):
    config, _, file = finished
    options = {k: v.replace('FILE', file).replace('RUN', os.path.dirname(file)) if isinstance(v, str) else v
               for k, v in options.items()}
    with pytest.raises(UserError, match=message) as error:
        validate(validation(config, **options))
    assert '\n' not in str(error.value)


def test_training_says_what_is_new_in_one_line_and_in_its_result(finished, tmp_path, capsys):
    config, _, file = finished
    capsys.readouterr()
    result = train(replace(config, experiment='second', model='test_resnet_spinal', pretrained_path=file,
                           model_kwargs=dict(head_width=8)))
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('weights '))
    assert line == (f'weights {file}: 90 tensors loaded, 2 left out (fc.bias, fc.weight), 30 new (attached_head.hidden.'
                    'first.fc.weight, attached_head.hidden.first.fc.bias, attached_head.hidden.first.norm.weight and '
                    '27 more)')
    found = json.loads((tmp_path / 'second' / 'result.json').read_text())['weights']
    assert found == result['weights'] and found['source'] == file and found['loaded'] == 90
    assert found['left_out'] == ['fc.bias', 'fc.weight'] and len(found['new']) == 30
    assert train(replace(config, experiment='third'))['weights'] is None


@pytest.mark.parametrize('option', ['pretrained_path', 'initial_checkpoint'])
def test_weights_of_another_network_start_no_run(finished, option, tmp_path):
    config, _, file = finished
    with pytest.raises(UserError, match=f'{option} .*: the weights are not of resnet20_cifar: they fill [01] of 9'):
        train(replace(config, experiment='second', model='resnet20_cifar', **{option: file}))
    assert not (tmp_path / 'second').exists()


def test_an_initial_checkpoint_is_exact(finished):
    config, _, file = finished
    with pytest.raises(UserError, match='fc.weight is 2x96 in the file and 3x96 .*; --pretrained-path keeps what fits'):
        create_model(replace(config, initial_checkpoint=file), 3)


@pytest.mark.slow
def test_the_main_process_alone_tells(finished, tmp_path, launch):
    config, _, file = finished
    config = replace(config, experiment='second', model='test_resnet_spinal', pretrained_path=file)
    done = launch(2, *command(config)[1:])
    assert done.stdout.count('weights ') == 1 and (done.stdout + done.stderr).count('head is new') == 1


@pytest.mark.slow
@pytest.mark.parametrize('gone', [True, False])
def test_a_resumed_run_needs_its_file_no_more(gone, tmp_path, capsys):
    """Which older versions took whatever was in it; the run ends with the same bits. One that starts does need it."""
    torch.manual_seed(1)
    file = tmp_path / 'start.safetensors'
    save_file(timm.create_model('test_resnet', num_classes=5).state_dict(), file)
    whole = small_config(tmp_path, model='test_resnet', pretrained_path=str(file), epochs=2)
    train(whole)
    half = replace(whole, experiment='half', stop_epoch=1)
    train(half)
    file.unlink()
    if not gone:
        save_file(timm.create_model('resnet20_cifar').state_dict(), file)
    capsys.readouterr()
    result = train(resumed(replace(half, stop_epoch=None)))
    assert 'the weights that the run started from are not checked again (pretrained_path' in capsys.readouterr().out
    assert_same_state(whole, half)
    assert result['weights'] is None
    with pytest.raises(UserError, match='no such file' if gone else 'the weights are not of test_resnet'):
        train(replace(whole, experiment='other', resume='auto'))


def test_a_comparison_reports_its_weights(tmp_path, capsys):
    torch.manual_seed(1)
    make_folder(tmp_path / 'images', per_class=20, size=36)
    (tmp_path / 'images' / 'validation').rename(tmp_path / 'images' / 'test')
    save_file(timm.create_model('test_resnet', num_classes=5).state_dict(), tmp_path / 'fits.safetensors')
    save_file(timm.create_model('resnet20_cifar').state_dict(), tmp_path / 'other.safetensors')
    config = FrozenConfig(
        backbone='test_resnet', data_dir=str(tmp_path / 'images'), val_split_fraction=0.2, test_split='test',
        img_size=32, workers=0, heads='linear', seeds='1', epochs=1, head_batch_size=8, output=str(tmp_path / 'out'))
    compare_frozen(replace(config, pretrained_path=str(tmp_path / 'fits.safetensors')), 'command')
    line = f'{tmp_path}/fits.safetensors: 90 tensors loaded, 2 left out (fc.bias, fc.weight), none new'
    assert f'weights {line}\n' in capsys.readouterr().out
    assert f'- Weights: {line}\n' in (tmp_path / 'out' / 'report.md').read_text()
    other = replace(config, pretrained_path=str(tmp_path / 'other.safetensors'), output=str(tmp_path / 'no'))
    with pytest.raises(UserError, match='the weights are not of test_resnet: they fill 0 of 75'):
        compare_frozen(other, 'command')
    assert not (tmp_path / 'no').exists()


def test_one_line_and_exit_code_2(finished, capsys, tmp_path):
    config, _, file = finished
    (tmp_path / 'zero.pth').write_bytes(b'')
    argv = ['train', '--model', 'test_resnet', '--data-dir', config.data_dir, '--pretrained-path']
    assert main([*argv, str(tmp_path / 'zero.pth')]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f'error: pretrained_path {tmp_path}/zero.pth: is empty; copy or download it again']
