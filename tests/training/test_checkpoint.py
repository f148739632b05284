import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save as save_tensors

from timm_spinal.errors import UserError
from timm_spinal.training.checkpoint import (
    _write_manifest,
    choose_checkpoint,
    damage,
    find_checkpoints,
    load_checkpoint,
    newest_whole,
    read_state,
    save_checkpoint,
)
from timm_spinal.training.train import train

from .runs import RANDOM, assert_same_state, command, resumed, small_config, snapshot, train_until

LOG_WITH = ['tensorboard'] if find_spec('tensorboard') else []


@pytest.fixture
def trained(tmp_path):
    """An accelerator with a model after one update, and a moving average."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ema = torch.nn.Linear(3, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    accelerator.backward(model(torch.randn(5, 3)).square().sum())
    optimizer.step()
    return accelerator, model, optimizer, ema


def save(trained, folder, step, keep=3):
    accelerator, _, _, ema = trained
    return save_checkpoint(accelerator, folder, step, dict(step=step), ema, keep)


def test_round_trip(trained, tmp_path):
    accelerator, model, optimizer, ema = trained
    checkpoint = save(trained, tmp_path, 7)
    assert checkpoint == tmp_path / 'step-00000007'
    assert damage(checkpoint) is None
    assert read_state(checkpoint) == dict(step=7)
    weight, average = model[0].weight.clone(), ema.weight.clone()
    moment = optimizer.state[model[0].weight]['exp_avg'].clone()
    draw = torch.rand(3)
    with torch.no_grad():
        model[0].weight.zero_()
        ema.weight.zero_()
    optimizer.state[model[0].weight]['exp_avg'].zero_()
    load_checkpoint(accelerator, checkpoint, ema)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(ema.weight, average)
    assert torch.equal(optimizer.state[model[0].weight]['exp_avg'], moment)
    assert torch.equal(torch.rand(3), draw)


def test_keeps_the_last(trained, tmp_path):
    for step in (1, 2, 30):
        save(trained, tmp_path, step, keep=2)
    assert [c.name for c in find_checkpoints(tmp_path)] == ['step-00000030', 'step-00000002']


def test_steps_of_a_course_that_was_left_are_removed(trained, tmp_path):
    for step in (1, 5, 6, 2):
        save(trained, tmp_path, step, keep=3)
    assert [c.name for c in find_checkpoints(tmp_path)] == ['step-00000002', 'step-00000001']


def test_same_step_is_replaced(trained, tmp_path):
    first = save(trained, tmp_path, 1)
    with torch.no_grad():
        trained[3].bias.add_(1)
    again = save(trained, tmp_path, 1)
    assert again == first and damage(again) is None
    assert os.listdir(tmp_path) == ['step-00000001']


def test_checkpoint_set_aside_is_found(trained, tmp_path):
    """A kill between the two renames of a replacement leaves only the one that stepped aside."""
    save(trained, tmp_path, 1)
    save(trained, tmp_path, 2).rename(tmp_path / 'step-00000002.old')
    assert [c.name for c in find_checkpoints(tmp_path)] == ['step-00000002.old', 'step-00000001']


def test_leftovers_are_removed(trained, tmp_path):
    (tmp_path / '.step-00000001.tmp').mkdir()
    (tmp_path / '.step-00000001.tmp' / 'model.safetensors').write_text('half')
    save(trained, tmp_path, 2)
    assert os.listdir(tmp_path) == ['step-00000002']


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer.bin', 'random_states_0.pkl', 'state.json'])
@pytest.mark.parametrize('spoil, reason', [(truncate, 'bytes instead of'), (flip, 'another checksum'),
                                           (os.remove, 'is missing')])
def test_damage_is_found_in_every_file(trained, tmp_path, name, spoil, reason):
    checkpoint = save(trained, tmp_path, 1)
    spoil(checkpoint / name)
    assert reason in damage(checkpoint) and name in damage(checkpoint)


@pytest.mark.parametrize('manifest', ['', '{"files"', '[]', '{"files": {"model.safetensors": 3}}'])
def test_damaged_manifest(trained, tmp_path, manifest):
    checkpoint = save(trained, tmp_path, 1)
    (checkpoint / 'manifest.json').write_text(manifest)
    assert 'manifest.json cannot be read' in damage(checkpoint)


def test_falls_back_and_says_so(trained, tmp_path):
    for step in (1, 2):
        save(trained, tmp_path, step)
    truncate(tmp_path / 'step-00000002' / 'optimizer.bin')
    said = []
    assert newest_whole(find_checkpoints(tmp_path), said.append) == tmp_path / 'step-00000001'
    assert len(said) == 1
    assert 'step-00000002 is damaged (optimizer.bin has' in said[0] and 'falling back to' in said[0]
    truncate(tmp_path / 'step-00000001' / 'optimizer.bin')
    with pytest.raises(UserError, match='all 2 are damaged'):
        newest_whole(find_checkpoints(tmp_path), said.append)


def test_choose(trained, tmp_path):
    for step in (1, 2, 3):
        save(trained, tmp_path / 'last', step)
    second = tmp_path / 'last' / 'step-00000002'
    assert choose_checkpoint('auto', tmp_path, print).name == 'step-00000003'
    assert choose_checkpoint(str(tmp_path), None, print).name == 'step-00000003'
    assert choose_checkpoint(str(second), None, print) == second
    truncate(second / 'state.json')
    assert choose_checkpoint(str(second), None, print).name == 'step-00000001'
    assert choose_checkpoint('auto', tmp_path / 'other', print) is None
    for nothing in (tmp_path / 'other', second.with_name('step-00000009')):
        with pytest.raises(UserError, match='no checkpoint there'):
            choose_checkpoint(str(nothing), None, print)


def test_full_disk_keeps_the_checkpoint_before(trained, tmp_path):
    """The operating system refuses to write beyond 1 kB, as it refuses on a full disk."""
    first = save(trained, tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError) as error:
            save(trained, tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'cannot write checkpoint' in str(error.value) and '\n' not in str(error.value)
    assert os.listdir(tmp_path) == [first.name] and damage(first) is None


# ---- runs -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    """Dropout, mixing, erasing, accumulation with a short last window, moving average; three kills, mid-epoch."""
    whole = small_config(tmp_path, experiment='whole', **RANDOM)
    broken = replace(whole, experiment='broken')
    train(whole)
    train_until(monkeypatch, broken, 3, Killed())
    train_until(monkeypatch, resumed(broken), 3, Killed())
    train_until(monkeypatch, resumed(broken), 1, Killed())
    train(resumed(broken))
    assert_same_state(whole, broken)
    tables = [list(csv.DictReader((tmp_path / name / 'summary.csv').open())) for name in ('whole', 'broken')]
    assert len(tables[0]) == 3
    for one, other in zip(*tables):
        times = ('images_per_second', 'seconds')
        assert {k: other[k] for k in one if k not in times} == {k: v for k, v in one.items() if k not in times}
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'broken')]
    assert [r['top1'] for r in results] == [results[0]['top1']] * 2
    weights = [(tmp_path / name / 'model.safetensors').read_bytes() for name in ('whole', 'broken')]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_seed_matters(tmp_path):
    """The check above can fail."""
    one, two = (small_config(tmp_path, experiment=str(seed), seed=seed, epochs=1, **RANDOM) for seed in (1, 2))
    train(one)
    train(two)
    with pytest.raises(AssertionError):
        assert_same_state(one, two)


@pytest.mark.slow
def test_resume_falls_back_on_a_damaged_checkpoint(tmp_path, monkeypatch, capsys):
    whole = small_config(tmp_path, experiment='whole', epochs=2, **RANDOM)
    broken = replace(whole, experiment='broken')
    train(whole)
    train_until(monkeypatch, broken, 5, Killed())
    newest = find_checkpoints(tmp_path / 'broken' / 'last')[0]
    truncate(newest / 'model.safetensors')
    train(resumed(broken))
    assert f'{newest} is damaged (model.safetensors has' in capsys.readouterr().out
    assert_same_state(whole, broken)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of one epoch; who uses it must leave it as it is."""
    config = small_config(tmp_path_factory.mktemp('finished'), epochs=1, opt='adamw', log_with=LOG_WITH)
    train(config)
    return config


@pytest.mark.parametrize('change, message', [
    (dict(model='test_efficientnet_gn'), r"cannot resume .*: model \('\w+' -> "),
    (dict(batch_size=2), r'cannot resume .*: batch_size \(4 -> 2'),
    (dict(seed=9), r'cannot resume .*: seed \(3 -> 9'),
    (dict(opt='sgd', sched='step'), r"cannot resume .*: opt \('adamw' -> 'sgd'"),
    (dict(train_split='validation'), r"cannot resume .*: train_split \('train' -> "),
    (dict(num_classes=5), r'cannot resume .*: num_classes \(2 -> 5\)'),
    (dict(opt='adamww'), "unknown optimizer|cannot resume"),
    (dict(lr_noise=[0.5], sched='nonsense'), 'schedule nonsense'),
    (dict(mixup=0.5, batch_size=3), 'use an even number'),
    (dict(data_dir='/nowhere'), '/nowhere'),
    (dict(log_with=['papyrus']), 'papyrus'),
    (dict(initial_checkpoint='/nowhere.pth'), 'no such file'),
])
def test_refused_resume_writes_nothing(finished, change, message):
    """No file of the run is touched, and trackers are not started."""
    folder = Path(finished.output)
    before = snapshot(folder)
    for resume in ('auto', str(folder / 'run')):
        with pytest.raises(UserError, match=message) as error:
            train(replace(finished, resume=resume, **change))
        assert 'sched ' not in str(error.value) and '\n' not in str(error.value)
        assert snapshot(folder).keys() == before.keys()
        assert {p: v for p, v in snapshot(folder).items() if p.is_file()} == {
            p: v for p, v in before.items() if p.is_file()}


def copied(finished, folder):
    shutil.copytree(finished.output, folder, dirs_exist_ok=True)
    return replace(finished, output=str(folder), data_dir=str(folder / 'images'))


def rewrite(path, content):
    """Change a file of a checkpoint as if it had been written so."""
    path.write_bytes(content)
    (path.parent / 'manifest.json').unlink()
    _write_manifest(path.parent)


def test_resume_refuses_more_images(finished, tmp_path):
    config = copied(replace(finished, data_dir=''), tmp_path)
    extra = next((tmp_path / 'images' / 'train' / 'ant').iterdir())
    (extra.parent / 'extra.png').write_bytes(extra.read_bytes())
    before = (tmp_path / 'run' / 'args.yaml').read_bytes()
    with pytest.raises(UserError, match=r'train_size \(22 -> 23\)'):
        train(resumed(replace(config, lr=0.5)))
    assert (tmp_path / 'run' / 'args.yaml').read_bytes() == before


@pytest.mark.parametrize('spoil, message', [
    (lambda last: [truncate(p / 'state.json') for p in find_checkpoints(last)], 'all 1 are damaged'),
    (lambda last: rewrite(find_checkpoints(last)[0] / 'model.safetensors', save_tensors({'a': torch.zeros(2)})),
     'its state does not fit this run'),
    (lambda last: rewrite(find_checkpoints(last)[0] / 'optimizer.bin', b'nonsense'), 'its state does not fit this run'),
    (lambda last: rewrite(find_checkpoints(last)[0] / 'state.json', without_progress(last)), 'another version of'),
])
def test_checkpoint_that_cannot_be_put_back_is_left_alone(finished, tmp_path, spoil, message):
    config = copied(finished, tmp_path)
    config = replace(config, lr=0.5)
    state = find_checkpoints(tmp_path / 'run' / 'last')[0] / 'state.json'
    saved = json.loads(state.read_text())
    saved['config']['data_dir'] = config.data_dir
    rewrite(state, json.dumps(saved).encode())
    spoil(tmp_path / 'run' / 'last')
    before = snapshot(tmp_path / 'run')
    with pytest.raises(UserError, match=message) as error:
        train(resumed(config))
    assert '\n' not in str(error.value)
    after = snapshot(tmp_path / 'run')
    assert after.keys() == before.keys() and [p for p in after if p.is_file() and after[p] != before[p]] == []


def without_progress(last):
    state = read_state(find_checkpoints(last)[0])
    return json.dumps(dict(state, progress=dict(state['progress'], something_new=1))).encode()


@pytest.mark.slow
@pytest.mark.parametrize('content', [b'nonsense', b''])
def test_random_states_that_cannot_be_read_are_told(tmp_path, capsys, content):
    config = small_config(tmp_path, epochs=1)
    train(config)
    train(resumed(config, epochs=2))
    assert 'random states' not in capsys.readouterr().out
    checkpoint = find_checkpoints(tmp_path / 'run' / 'last')[0]
    rewrite(checkpoint / 'random_states_0.pkl', content)
    assert train(resumed(config, epochs=3))['epochs'] == 3
    assert (f'warning: random states of {checkpoint} cannot be read (random_states_0.pkl: '
            in capsys.readouterr().out)


@pytest.mark.slow
def test_resume_allows_more_epochs_and_tells_of_the_rest(tmp_path, capsys):
    config = small_config(tmp_path, epochs=1)
    train(config)
    result = train(resumed(config, epochs=2, log_interval=1, weight_decay=0.1))
    assert result['epochs'] == 2
    out = capsys.readouterr().out
    assert 'resuming with another weight_decay: 2e-05 -> 0.1' in out
    assert 'another epochs' not in out and 'another log_interval' not in out


@pytest.mark.slow
def test_sigkill(tmp_path):
    """The real thing: a process that dies without a word."""
    whole = small_config(tmp_path, experiment='whole', epochs=4, **RANDOM)
    broken = replace(whole, experiment='broken')
    env = dict(os.environ, OMP_NUM_THREADS='1')
    process = subprocess.Popen(command(broken), stdout=subprocess.DEVNULL, env=env)
    deadline = time.monotonic() + 120
    while not find_checkpoints(tmp_path / 'broken' / 'last') and time.monotonic() < deadline:
        assert process.poll() is None, 'the run ended too early to be killed'
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(whole)
    train(resumed(broken))
    assert_same_state(whole, broken)
