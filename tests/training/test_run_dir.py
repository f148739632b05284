import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from timm_spinal.compare.cli import main as compare
from timm_spinal.detection.problem import train_detector
from timm_spinal.errors import UserError
from timm_spinal.training.run_dir import LOCK, FolderLock, Occupied, check_name
from timm_spinal.training.train import train

from ..detection.test_problem import small_config as detection_config
from .runs import command, resumed, small_config, snapshot

HOLD = """
import os, sys, time
from pathlib import Path
from timm_spinal.training.run_dir import FolderLock
for folder in sys.argv[1:]:
    FolderLock(Path(folder)).acquire()
if os.fork() == 0:  # as loader workers are
    time.sleep(60)
print('held', flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """``holder(folder, ...)``: a process that holds some folders, and has a forked child; it is killed at the end."""
    processes = []

    def start(*folders) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, '-c', HOLD, *map(str, folders)], stdout=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        assert process.stdout.readline() == 'held\n'
        return process

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize('name', ['first-run', 'a b', 'r.1', '.hidden', 'überlauf', 'x' * 200])
def test_names(name):
    check_name(name, '--experiment')


@pytest.mark.parametrize('name', [
    '../elsewhere', '..', '.', '/tmp/x', 'a/b', 'a/', 'a\\b', ' a', 'a ', 'a\n', 'a\tb', ' ', '', 'a\0b',
    'x' * 201, 'ü' * 101])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match='^--experiment .*use a single name') as error:
        check_name(name, '--experiment')
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_folder_has_one_holder_until_it_lets_go_or_dies(tmp_path, holder):
    """A kill frees the folder at once, though a forked child of the process lives on."""
    folder = tmp_path / 'a' / 'b'
    process = holder(folder)
    with pytest.raises(Occupied, match=f'{folder}: a run is going on there .process {process.pid} on '):
        FolderLock(folder).acquire()
    assert os.listdir(folder) == [LOCK]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert os.listdir(folder) == [LOCK], 'a killed process leaves it behind'
    with FolderLock(folder):
        (folder / 'file').write_text('')
    assert os.listdir(folder) == ['file']


def test_folders_that_stayed_empty_are_removed(tmp_path):
    (tmp_path / 'a').mkdir()
    with FolderLock(tmp_path / 'a' / 'b' / 'c'):
        with FolderLock(tmp_path / 'a' / 'x' / '..' / 'b' / 'c'):
            pass
        assert (tmp_path / 'a' / 'b' / 'c' / LOCK).is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / 'a'] and list((tmp_path / 'a').iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_folder_that_cannot_be_made(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match='Permission denied; choose another --output'):
        FolderLock(tmp_path / 'a').acquire()


def test_file_in_the_way(tmp_path):
    (tmp_path / 'a').write_text('')
    with pytest.raises(UserError, match='choose another --output'):
        FolderLock(tmp_path / 'a' / 'b').acquire()


@pytest.mark.slow
def test_a_run_refuses_others_in_its_folder_from_its_first_instant(tmp_path):
    """Before the first checkpoint; nothing is written then. After a kill the run goes on."""
    config = small_config(tmp_path, epochs=1)
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / 'run' / LOCK).exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        assert not (tmp_path / 'run' / 'last').exists()
        before = snapshot(tmp_path / 'run')
        for other in (config, resumed(config), replace(config, model='test_resnet')):
            with pytest.raises(UserError, match='run: a run is going on there .process .*choose another --experiment'):
                train(other)
        assert snapshot(tmp_path / 'run') == before
    finally:
        process.kill()
        process.wait()
    assert train(resumed(config))['epochs'] == 1
    assert LOCK not in os.listdir(tmp_path / 'run')


@pytest.mark.slow
def test_every_kind_of_run_refuses_a_folder_that_is_held(tmp_path, holder):
    from ..compare.test_sweep import write
    for name in ('detector', 'frozen', 'sweep', 'features'):
        (tmp_path / name).mkdir()
    holder(*(tmp_path / name for name in ('detector', 'frozen', 'sweep', 'features')))
    frozen = ['--backbone', 'test_resnet', '--dataset', 'digits', '--img-size', '32', '-j', '0', '--train-size', '40',
              '--heads', 'linear', '--seeds', '1', '--epochs', '1', '--head-batch-size', '8', '--output']
    for start in (
            lambda: train_detector(detection_config(tmp_path, experiment='detector')),
            lambda: compare([*frozen, str(tmp_path / 'frozen')]),
            lambda: compare(['--sweep', str(write(tmp_path / 's.yaml', output=str(tmp_path / 'sweep')))]),
            lambda: compare([*frozen, str(tmp_path / 'free'), '--features', str(tmp_path / 'features')])):
        with pytest.raises(UserError, match='a run is going on there'):
            start()
    for name in ('detector', 'frozen', 'sweep'):
        assert os.listdir(tmp_path / name) == [LOCK]
    assert not (tmp_path / 'free').exists()


@pytest.mark.slow
def test_a_run_of_a_sweep_that_is_held_is_no_failure_of_that_run(tmp_path, holder):
    from timm_spinal.compare.jobs import Task, run_tasks
    config = small_config(tmp_path, resume='auto', experiment='seed-0')
    holder(tmp_path / 'seed-0')
    assert run_tasks([Task('a', config)], 1) == 1
    assert os.listdir(tmp_path / 'seed-0') == [LOCK]


@pytest.mark.slow
def test_runs_without_a_name_that_start_together_have_a_folder_each(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(time, 'strftime', lambda form: 'now')
    config = small_config(tmp_path, epochs=1, experiment='')
    exists = type(tmp_path).exists
    taken = tmp_path / 'now-test_efficientnet-32'
    # the other run makes the folder after this one has looked
    started = []

    def late(self, *args, **kwargs):
        if self == taken and not started:
            started.append(holder(taken))
            return False
        return exists(self, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), 'exists', late)
    train(config)
    assert (tmp_path / f'{taken.name}-2' / 'result.json').is_file() and os.listdir(taken) == [LOCK]


@pytest.mark.slow
def test_a_checkpoint_does_not_go_into_the_folder_of_another_run(tmp_path):
    config = small_config(tmp_path, epochs=1)
    train(config)
    other = replace(config, experiment='other')
    train(other)
    before = snapshot(tmp_path / 'other')
    with pytest.raises(UserError, match=f'other: it contains a run already; to go on in {tmp_path / "run"} leave out'):
        train(replace(other, resume=str(tmp_path / 'run'), epochs=2))
    assert snapshot(tmp_path / 'other') == before
    assert train(replace(config, experiment='third', resume=str(tmp_path / 'run'), epochs=2))['epochs'] == 2
