"""What is said of a run before it begins, and what its number of updates decides."""
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn as nn

from timm_spinal.training.model import fit_momentum
from timm_spinal.training.train import train

from .images import make_folder
from .runs import small_config


def plan(config, capsys):
    """The lines of a run's plan and its warnings, and the result of the run."""
    capsys.readouterr()
    result = train(config)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(('plan', 'warning: ', 'BatchNorm'))], result


def test_plan_is_what_is_done(tmp_path, capsys):
    config = small_config(tmp_path, epoch_repeats=0., epochs=2, warmup_epochs=1, freeze_epochs=1)
    lines, result = plan(config, capsys)
    assert lines == [
        'plan: 22 images, batch 4, 6 updates an epoch, 2 epochs, 12 updates in all, warm-up 6 updates, '
        '0 images left out of each epoch, 1 epochs of the head alone',
        'warning: 12 updates are few for a model to learn from; raise --epochs, lower --batch-size, or give '
        '--min-updates 300',
    ]
    assert result['updates'] == 12


@pytest.mark.slow
def test_plan_of_accumulated_steps_and_a_part_of_the_images(tmp_path, capsys):
    lines, result = plan(small_config(tmp_path, epochs=1, grad_accum_steps=2), capsys)
    assert lines[0] == (
        'plan: 22 images, batch 4 x 2 steps, 3 updates an epoch, 1 epochs, 3 updates in all, warm-up 0 updates, '
        '2 images left out of each epoch')
    assert result['updates'] == 3
    lines, _ = plan(small_config(tmp_path, epochs=1, experiment='repeats', aug_repeats=3), capsys)
    assert '15 images left out of each epoch' in lines[0]  # 20 places for 7 different images


@pytest.mark.slow
def test_warmup_that_is_most_of_the_run(tmp_path, capsys):
    config = small_config(tmp_path, epochs=3, warmup_epochs=2)
    warning = 'warning: 2 of 3 epochs are warm-up, in which the learning rate is still low; lower --warmup-epochs or ' \
        'raise --epochs'
    assert warning in plan(config, capsys)[0]
    found, _ = plan(replace(config, experiment='all', warmup_epochs=5), capsys)
    assert 'warm-up 25 updates' in found[0] and found[1].startswith('warning: 3 of 3 epochs')
    assert warning not in plan(replace(config, experiment='less', warmup_epochs=1), capsys)[0]


@pytest.mark.slow
def test_least_updates(tmp_path, capsys):
    config = small_config(tmp_path, epoch_repeats=0., epochs=2, min_updates=101, batch_size=2, model='test_vit')
    lines, result = plan(config, capsys)
    assert '51 updates an epoch, 2 epochs, 102 updates in all' in lines[0]
    assert not any('updates are few' in line for line in lines)
    assert result['updates'] == 102


@pytest.mark.parametrize('updates, momentum', [(135, 0.1), (200, 0.1), (1000, 0.02), (2000, 0.01), (5000, 0.01)])
def test_momentum_fits_the_number_of_updates(updates, momentum):
    model = timm.create_model('spinalcnn_plain_xnodr', num_classes=10)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {m.momentum for m in norms} == {0.01}
    lines = fit_momentum(model, updates, {})
    assert {m.momentum for m in norms} == {momentum} and len(lines) == (momentum != 0.01)
    assert not lines or lines[0].startswith(f'BatchNorm momentum of {len(norms)} layers: {momentum:g} in place of 0.01')


def test_momentum_that_was_asked_for_or_is_high_enough_stays():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.05), nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None))
    assert fit_momentum(model, 10, {'head_norm_momentum': 0.05}) == [] == fit_momentum(model, 10, {}, [model[0]])
    assert [m.momentum for m in model] == [0.05, 0.1, None]
    assert len(fit_momentum(model, 10, {})) == 1
    assert [m.momentum for m in model] == [0.1, 0.1, None]


@pytest.mark.slow
def test_capsules_learn_in_a_short_run(tmp_path, capsys):
    """A momentum of 0.01 leaves 26 % of the first statistics after 135 updates, and 9.8 % of the answers right."""
    pytest.importorskip('sklearn')
    config = small_config(
        tmp_path, data_dir='', dataset='digits', model='spinalcnn_plain_xnodr', img_size=None, loss='margin', epochs=3,
        opt='adamw', lr=0.002, batch_size=32, smoothing=0., scale=[0.9, 1.], hflip=0., color_jitter=0., drop=0.,
        epoch_repeats=0., seed=42)
    lines, result = plan(config, capsys)
    assert 'BatchNorm momentum of 3 layers: 0.1 in place of 0.01, for a run of 135 updates' in lines
    assert result['top1'] > 60 and result['same_answer'] is None
    kept, result = plan(replace(config, experiment='kept', bn_momentum=0.01), capsys)
    assert result['top1'] < 40 and 'BatchNorm' not in ''.join(kept)


def test_an_answer_that_is_always_the_same_is_named(tmp_path, capsys):
    """At a learning rate of zero, with a bias that no image overcomes."""
    make_folder(tmp_path / 'images', per_class=11, size=36)
    config = small_config(tmp_path, epochs=1, lr=1e-12, model='test_vit', drop=0.)
    weights = timm.create_model('test_vit', num_classes=2, img_size=32).state_dict()
    weights['head.bias'] = torch.tensor([0., 50.])
    torch.save(weights, tmp_path / 'biased.pth')
    lines, result = plan(replace(config, initial_checkpoint=str(tmp_path / 'biased.pth')), capsys)
    assert result['same_answer'] == [1] and result['top1'] == 50.
    named = 'warning: the model answers bee for every image, so it tells no classes apart'
    assert sum(line.startswith(named) for line in lines) == 1
    from timm_spinal.cli import main
    assert main(['validate', '--checkpoint', str(tmp_path / 'run'), '--data-dir', str(tmp_path / 'images'),
                 '-j', '0', '-vb', '8']) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and out[0].startswith('weights ')
    assert out[2].startswith(f'warning: {tmp_path / "run"} answers class 1 for every image')
