import csv
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from timm_spinal.errors import StopRequested, UserError
from timm_spinal.training import task as task_module
from timm_spinal.training import train as train_module
from timm_spinal.training.checkpoint import damage, find_checkpoints
from timm_spinal.training.config import to_yaml
from timm_spinal.training.train import train

from .runs import RANDOM, assert_same_state, at_update, last_state, resumed, send_signal, small_config


def rows(config):
    with open(f'{config.output}/{config.experiment}/summary.csv') as f:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(f)]


# a model without BatchNorm or dropout, whose gradients are sums over the images
EXACT = dict(model='test_vit', drop=0., no_aug=True, opt='sgd', epochs=1, smoothing=0., lr=0.05)


def weights(config):
    return {k: v for k, v in last_state(config).items() if k.startswith('model.')}


def difference(one, two):
    return max((a - b).abs().max().item() for a, b in zip(weights(one).values(), weights(two).values()))


@pytest.mark.slow
def test_accumulation_equals_a_large_batch(tmp_path):
    """5 batches of 4 of 22 images, or all of them: 11 of 2 in 5 windows and a last one of a single batch."""
    large = small_config(tmp_path, experiment='large', batch_size=4, checkpoint_steps=1, checkpoint_hist=9, **EXACT)
    small = replace(large, experiment='small', batch_size=2, grad_accum_steps=2, epoch_repeats=1.)
    other = replace(large, experiment='other', lr=0.051)
    assert [train(config)['updates'] for config in (large, small, other)] == [5, 6, 5]
    after_four = [load_file(tmp_path / name / 'last' / 'step-00000004' / 'model.safetensors')
                  for name in ('large', 'small', 'other')]
    for key in after_four[0]:
        torch.testing.assert_close(after_four[0][key], after_four[1][key], atol=2e-6, rtol=1e-5)
    assert (after_four[0]['head.weight'] - after_four[2]['head.weight']).abs().max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('accum, last', [(5, 5), (9, 5)])
def test_short_window_is_stepped_at_full_scale(tmp_path, accum, last):
    """A window that the epoch cuts short is a mean over its own batches, so it equals one large batch of them."""
    windows = small_config(tmp_path, experiment='windows', batch_size=4, grad_accum_steps=accum, **EXACT)
    one = replace(windows, experiment='one', batch_size=4 * last, grad_accum_steps=1)
    assert train(windows)['updates'] == train(one)['updates'] == 1
    assert difference(windows, one) < 2e-6


def test_penalty_counts_once_per_update(tmp_path, monkeypatch):
    """Its gradient does not depend on the accumulation, and it has its own column."""
    calls = []

    def factory(config, model):
        def penalty():
            calls.append(1)
            return 0.5 * model.head.weight.sum()
        return penalty

    plain = small_config(tmp_path, experiment='plain', grad_accum_steps=5, **{**EXACT, 'opt': 'momentum'},
                         momentum=0., weight_decay=0.)
    train(plain)
    monkeypatch.setitem(task_module.PENALTIES, 'sum', factory)
    punished = replace(plain, experiment='punished')
    train(punished)
    assert len(calls) == 1  # five batches, one update
    step = weights(plain)['model.head.weight'] - weights(punished)['model.head.weight']
    torch.testing.assert_close(step, torch.full_like(step, 0.5 * 0.05), atol=1e-6, rtol=0)
    assert rows(punished)[0]['train_sum'] != 0 and 'train_sum' not in rows(plain)[0]
    assert rows(punished)[0]['train_loss'] == pytest.approx(rows(plain)[0]['train_loss'], abs=1e-6)


def test_loss_column_is_the_mean_over_images(tmp_path):
    """With a learning rate of zero the mean training loss is the loss of the untrained model."""
    config = small_config(tmp_path, **{**EXACT, 'lr': 1e-12}, train_split='validation')
    train(config)
    row = rows(config)[0]
    # 20 of the 22 images are seen in training
    assert row['train_loss'] == pytest.approx(row['eval_loss'], rel=0.2)
    assert row['lr'] == pytest.approx(1e-12)


def test_ema_is_evaluated_and_can_be_the_best(tmp_path):
    config = small_config(tmp_path, model_ema=True, model_ema_decay=0.5, epochs=2)
    result = train(config)
    assert all(row['ema_loss'] != row['eval_loss'] for row in rows(config))
    candidates = [(row[f'{w}_top1'], w) for row in rows(config) for w in ('eval', 'ema')]
    assert result['top1'] == max(c[0] for c in candidates)
    best = load_file(tmp_path / 'run' / 'model.safetensors')
    state = last_state(config)
    if result['best_epoch'] == 1:
        prefix = 'ema.module.' if result['best_weights'] == 'ema' else 'model.'
        assert all(torch.equal(best[k], state[prefix + k]) for k in best)


def test_ema_value(tmp_path):
    """One update: the average is the model; a second one: decay times the first plus the rest of the second."""
    config = small_config(tmp_path, model_ema=True, model_ema_decay=0.75, epochs=2, grad_accum_steps=5)
    train(config)
    second, first = find_checkpoints(tmp_path / 'run' / 'last')
    one, two = (load_file(c / 'model.safetensors') for c in (first, second))
    average = load_file(second / 'ema.safetensors')
    key = 'conv_stem.weight'
    torch.testing.assert_close(average[f'module.{key}'], 0.75 * one[key] + 0.25 * two[key])


@pytest.mark.parametrize('skipped', [False, True])
def test_ema_takes_no_part_in_a_skipped_step(tmp_path, monkeypatch, skipped):
    """As under fp16, whose scaler leaves a step out after an overflow: then the average does not move."""
    monkeypatch.setattr(Accelerator, 'optimizer_step_was_skipped', property(lambda self: skipped))
    averaged = dict(model_ema=True, model_ema_decay=0.5)
    train(small_config(tmp_path, epochs=1, checkpoint_steps=1, checkpoint_hist=9, **averaged))
    first, *_, last = (load_file(tmp_path / 'run' / 'last' / f'step-{step:08d}' / 'ema.safetensors') for step in (1, 5))
    moved = [k for k in first if not torch.equal(first[k], last[k])]
    assert bool(moved) != skipped


@pytest.mark.slow
def test_mixup_off_epoch(tmp_path):
    config = small_config(tmp_path, mixup=1., mixup_off_epoch=1, **{**EXACT, 'epochs': 2, 'lr': 1e-12})
    train(config)
    mixed, plain = (row['train_loss'] for row in rows(config))
    unmixed = replace(config, experiment='unmixed', mixup=0.)
    train(unmixed)
    assert rows(unmixed)[1]['train_loss'] == pytest.approx(plain, abs=1e-6)
    assert abs(rows(unmixed)[0]['train_loss'] - mixed) > 1e-4


def test_freeze_changes_the_head_only(tmp_path):
    config = small_config(tmp_path, freeze='backbone', epochs=1, checkpoint_steps=1, checkpoint_hist=9)
    train(config)
    newest, *_, oldest = find_checkpoints(tmp_path / 'run' / 'last')
    one, two = (load_file(c / 'model.safetensors') for c in (oldest, newest))
    assert {k for k in one if not torch.equal(one[k], two[k])} == {'classifier.weight', 'classifier.bias'}


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipping_limits_the_step(tmp_path, mode):
    free = small_config(tmp_path, experiment='free', **EXACT)
    clipped = replace(free, experiment=mode, clip_grad=1e-3, clip_mode=mode)
    train(free)
    train(clipped)
    torch.manual_seed(0)
    assert difference(free, clipped) > 1e-3


@pytest.mark.slow
def test_early_stop(tmp_path):
    config = small_config(tmp_path, **{**EXACT, 'lr': 1e-12, 'epochs': 20}, early_stop_patience=3)
    result = train(config)
    assert result['stopped_early'] and result['epochs'] == 4 and result['best_epoch'] == 0
    assert train(resumed(config))['epochs'] == 4
    assert train(resumed(config, early_stop_patience=5))['epochs'] == 6


@pytest.mark.slow
def test_stop_epoch_keeps_the_schedule(tmp_path):
    whole = small_config(tmp_path, experiment='whole', epochs=3)
    parts = replace(whole, experiment='parts', stop_epoch=1)
    train(whole)
    assert train(parts)['epochs'] == 1
    train(resumed(parts, stop_epoch=None))
    assert_same_state(whole, parts)


def test_val_interval(tmp_path):
    config = small_config(tmp_path, epochs=3, val_interval=2)
    train(config)
    assert [row['eval_top1'] is not None for row in rows(config)] == [False, True, True]


@pytest.mark.parametrize('options', [dict(lr=1e30), dict(lr=1e30, opt='adamw', model_ema=True, clip_grad=1.)])
def test_nan_stops_with_the_update_and_keeps_the_last_good_checkpoint(tmp_path, options):
    config = small_config(tmp_path, epochs=1)
    train(config)
    good = find_checkpoints(tmp_path / 'run' / 'last')[0]
    fresh = small_config(tmp_path, experiment='nan', **options)
    with pytest.raises(UserError, match=r'(loss is (nan|inf) at|a weight is NaN or infinite after) update \d+: '
                                        r'training stopped; no checkpoint had been written yet'):
        train(fresh)
    assert find_checkpoints(tmp_path / 'nan' / 'last') == []
    with pytest.raises(UserError, match=f'the last good checkpoint is {good}'):
        train(resumed(config, epochs=3, lr=1e30, sched='constant'))
    assert damage(good) is None
    assert all(v.isfinite().all() for v in last_state(config).values())


def test_loss_that_becomes_nan_later_is_noticed_before_a_checkpoint(tmp_path, monkeypatch):
    def poison(config, model):
        calls = []

        def spoil():
            calls.append(1)
            return torch.tensor(math.nan if len(calls) == 4 else 0.)
        return spoil

    monkeypatch.setitem(task_module.PENALTIES, 'poison', poison)
    config = small_config(tmp_path, checkpoint_steps=1, checkpoint_hist=9)
    with pytest.raises(UserError, match='poison is nan at update 4: '):
        train(config)
    assert [c.name for c in find_checkpoints(tmp_path / 'run' / 'last')] == [f'step-0000000{i}' for i in (3, 2, 1)]


def overflow(monkeypatch, model, first, last):
    """Give a run the scaler of fp16, and losses that are infinite in some updates."""
    updates = []
    create = train_module.create_accelerator

    def with_scaler(*args):
        accelerator = create(*args)
        accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=4., growth_interval=1000)
        return accelerator

    def factory(config, model):
        def penalty():
            updates.append(1)
            weight = next(model.parameters())
            return weight.sum() * (math.inf if first <= len(updates) <= last else 0.)
        return penalty

    monkeypatch.setattr(train_module, 'create_accelerator', with_scaler)
    monkeypatch.setitem(task_module.PENALTIES, 'much', factory)
    return updates


def test_overflow_under_fp16_ends_nothing_before_the_scaler_gives_up(tmp_path, monkeypatch):
    """The scale falls from 4 to 2 and 1, which the run survives; the updates are skipped and not in the means."""
    config = small_config(tmp_path, epochs=1)
    with monkeypatch.context() as patch:
        overflow(patch, 'test_efficientnet', 2, 3)
        result = train(config)
    row, = rows(config)
    assert result['updates'] == 5 and math.isfinite(row['train_loss']) and row['train_much'] == 0.
    assert all(v.isfinite().all() for v in last_state(config).values())
    plain = replace(config, experiment='plain')
    train(plain)
    assert difference(config, plain) > 0.


def test_overflow_in_every_update_ends_the_run(tmp_path, monkeypatch):
    """4, 2, 1, then 0.5 after the third skipped update."""
    config = small_config(tmp_path, epochs=1, checkpoint_steps=1, checkpoint_hist=9)
    with monkeypatch.context() as patch:
        updates = overflow(patch, 'test_efficientnet', 1, 100)
        with pytest.raises(UserError, match='at update 3, and the loss scale of fp16 has fallen to 0.5: training stop'):
            train(config)
    assert len(updates) == 3
    assert [c.name for c in find_checkpoints(tmp_path / 'run' / 'last')] == ['step-00000002', 'step-00000001']


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('update', [2, 3])
def test_signal_writes_a_checkpoint_and_stops(tmp_path, monkeypatch, signum, update):
    """In the middle of an epoch (2) and in its last update (3)."""
    options = {**RANDOM, 'checkpoint_steps': 0}
    whole = small_config(tmp_path, experiment='whole', **options)
    broken = replace(whole, experiment='broken')
    train(whole)
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        at_update(patch, update, lambda: send_signal(signum))
        with pytest.raises(StopRequested) as stop:
            train(broken)
    assert stop.value.signum == signum
    assert signal.getsignal(signum) is before
    newest = find_checkpoints(tmp_path / 'broken' / 'last')[0]
    assert damage(newest) is None and newest.name == f'step-0000000{update}'
    train(resumed(broken))
    assert_same_state(whole, broken)


def test_signal_during_evaluation(tmp_path, monkeypatch):
    config = small_config(tmp_path, model_ema=True)
    sent = []

    class Hook(torch.nn.Module):
        def forward(self, x):
            if not self.training and not sent:
                sent.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
            return x

    def factory(config, model):
        model.bn2.add_module('act', Hook())

    monkeypatch.setitem(task_module.PENALTIES, 'hook', factory)
    with pytest.raises(StopRequested):
        train(config)
    assert len(find_checkpoints(tmp_path / 'run' / 'last')) == 1


def test_changed_schedule_takes_effect_on_resume(tmp_path):
    config = small_config(tmp_path, epochs=1, weight_decay=0.1)
    train(config)
    train(resumed(config, epochs=4, lr=0.02, weight_decay=0.3))
    assert [row['lr'] for row in rows(config)] == pytest.approx(
        [0.01] + [0.02 * (0.5 + 0.5 * math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3)])
    optimizer = torch.load(find_checkpoints(tmp_path / 'run' / 'last')[0] / 'optimizer.bin', weights_only=True)
    assert {g['weight_decay'] for g in optimizer['param_groups']} == {0., 0.3}


TWO_PROCESSES = """
import os, signal, sys, torch
from dataclasses import replace
from timm_spinal.training import task as task_module
from timm_spinal.training.parser import parse_config
from timm_spinal.training.train import train
from timm_spinal.errors import StopRequested

whole = parse_config(sys.argv[1:])
broken = replace(whole, experiment='broken')
train(whole)
for update in (3, 2):
    calls = []

    def penalty():
        calls.append(1)
        if len(calls) == update and os.environ['RANK'] == '1':
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(())

    task_module.PENALTIES['signal'] = lambda config, model: penalty
    try:
        train(replace(broken, resume='auto' if update == 2 else ''))
        raise SystemExit('not stopped')
    except StopRequested as e:
        assert e.signum == signal.SIGTERM
task_module.PENALTIES.clear()
train(replace(broken, resume='auto'))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_bit_identical(tmp_path, launch):
    """The signal reaches the second process only; both checkpoint after the same update."""
    options = {**RANDOM, 'checkpoint_steps': 0, 'batch_size': 2}
    whole = small_config(tmp_path, experiment='whole', **options)
    (tmp_path / 'whole.yaml').write_text(to_yaml(whole))
    (tmp_path / 'script.py').write_text(TWO_PROCESSES)
    out = launch(2, str(tmp_path / 'script.py'), '--config', str(tmp_path / 'whole.yaml')).stdout
    assert out.count('resuming from') == 2  # said by the main process only
    assert_same_state(whole, replace(whole, experiment='broken'))
