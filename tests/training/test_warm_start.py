"""`--ic-warm-start` in a run."""
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.training.parser import parse_config
from timm_spinal.training.train import open_run, train

from .runs import assert_same_state, command, resumed, small_config


@pytest.fixture
def config(tmp_path):
    """An IC student with the weights of a plain model in a file."""
    torch.manual_seed(1)
    plain = timm.create_model('resnet20_cifar', num_classes=2)
    timm_spinal.recalibrate_bn(plain, torch.randn(32, 3, 32, 32))
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    return small_config(tmp_path, model='icresnet20_cifar', drop=0., epochs=1, ic_warm_start=0.05,
                        pretrained_path=str(tmp_path / 'plain.safetensors'))


def test_the_run_starts_from_it(config, tmp_path, capsys):
    with open_run(replace(config, data_on_device='never')) as run:
        model = run.task.trainable_module
    assert 'warm start: 18 collisions, active at ' in capsys.readouterr().out
    plain = load_file(tmp_path / 'plain.safetensors')
    state = model.state_dict()
    weights = {key for key in plain if key.endswith(('conv1.weight', 'conv2.weight', 'bn1.weight', 'bn2.bias'))}
    assert len(weights) == 36 and all(torch.equal(state[key], plain[key]) for key in weights)
    w = torch.cat([value for key, value in state.items() if key.endswith('ic_weight')])
    assert (w != 1.).all() and w.std() > 0.05 and model.training
    assert not torch.equal(state['stages.1.0.bn1.running_var'], plain['stages.1.0.bn1.running_var'])
    images = torch.stack([run.data.train_loader.dataset[i, None][0] for i in range(22)])
    shares = timm_spinal.ic_active_share(model, images)
    assert all(0. < share < 0.25 for share in shares.values())


@pytest.mark.slow
def test_resuming_does_not_start_anew(config, monkeypatch, capsys):
    whole = replace(config, experiment='whole', epochs=2)
    broken = replace(config, experiment='broken', epochs=2)
    train(whole)
    train(replace(broken, stop_epoch=1))
    capsys.readouterr()
    train(resumed(broken))
    assert 'warm start' not in capsys.readouterr().out
    assert_same_state(whole, broken)


@pytest.mark.slow
def test_two_processes_start_alike(config, tmp_path, launch):
    one = replace(config, experiment='one', lr=1e-12, batch_size=2)
    two = replace(one, experiment='two')
    train(one)
    assert launch(2, *command(two)[1:]).stdout.count('warm start: 18 collisions') == 1
    first, second = (load_file(tmp_path / name / 'model.safetensors') for name in ('one', 'two'))
    for key in first:
        if key.endswith('ic_weight'):
            torch.testing.assert_close(first[key], second[key])
            assert first[key].std() > 0.01


@pytest.mark.parametrize('options, text', [
    (dict(pretrained_path=None), '--ic-warm-start: the model starts without the weights of a plain'),
    (dict(model='resnet20_cifar'), '--ic-warm-start: SmallResNet has no IC convolution'),
    (dict(model_kwargs=dict(ic_norm='bn')), '--ic-warm-start: .* has BatchNorm inside sigma'),
])
def test_what_cannot_be_started(config, tmp_path, options, text):
    with pytest.raises(UserError, match=text) as error:
        train(replace(config, **options))
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_flag():
    assert parse_config(['--ic-warm-start']).ic_warm_start == 0.01
    assert parse_config(['--ic-warm-start', '0.05']).ic_warm_start == 0.05
    with pytest.raises(UserError, match='--ic-warm-start: .1. is too large'):
        parse_config(['--ic-warm-start', '1'])
