import os
import random
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import timm

from timm_spinal.cli import main
from timm_spinal.training.checkpoint import damage, find_checkpoints
from timm_spinal.training.config import to_yaml
from timm_spinal.training.train import train

from .conftest import launch_command, launch_env
from .training.runs import RANDOM, assert_same_state, command, resumed, small_config


def flags(config):
    return ['--data-dir', config.data_dir, '--model', config.model, '--img-size', '32', '-b', '4', '-j', '0',
            '--epochs', '1', '--warmup-epochs', '0', '--lr', '0.01', '--output', config.output, '--experiment', 'cli']


def test_command_line_is_the_function(tmp_path, capsys):
    config = small_config(tmp_path, drop=0., epoch_repeats=0.)
    assert main(['train', *flags(config), '--seed', '3']) == 0
    out = capsys.readouterr().out
    assert 'load it: ' in out.splitlines()[-1]
    train(replace(config, epochs=1))
    assert_same_state(replace(config, experiment='cli'), config)


@pytest.mark.slow
def test_module_under_accelerate_launch(tmp_path, launch):
    """Two processes print every line once, and the model loads."""
    config = small_config(tmp_path)
    (tmp_path / 'images' / 'train' / '.DS_Store').touch()
    out = launch(2, '-m', 'timm_spinal.train', *flags(config)).stdout
    assert out.count('epoch 0 (1 of 1): training loss') == out.count('load it: ') == out.count('run folder: ') == 1
    lines = out.splitlines()
    start = lines.index('split       images  classes  smallest class  largest class')
    assert lines[start + 1:start + 4] == [
        'train           22        2  ant (11)        bee (11)',
        'validation      22        2  ant (11)        bee (11)',
        f'{tmp_path / "images" / "train"}: skipped 1 hidden (.DS_Store)']
    assert out.count('smallest class') == out.count('skipped') == 1
    assert timm.create_model(f'local-dir:{tmp_path / "cli"}', pretrained=True).num_classes == 2


@pytest.mark.slow
def test_error_under_two_processes_is_printed_once(tmp_path, launch):
    config = small_config(tmp_path)
    done = launch(2, '-m', 'timm_spinal.train', *flags(config), '--opt', 'nonsense', check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: unknown optimizer 'nonsense'") == 1
    assert [p.name for p in tmp_path.iterdir()] == ['images']


@pytest.mark.slow
@pytest.mark.parametrize('where', ['always', 'never'])  # found before the run, or in the midst of it
def test_unreadable_image_in_one_of_two_processes(tmp_path, launch, where):
    config = small_config(tmp_path)
    bad = tmp_path / 'images' / 'train' / 'ant' / '3.png'
    bad.write_bytes(b'no image')
    done = launch(2, '-m', 'timm_spinal.train', *flags(config), '-b', '2', '--data-on-device', where, check=False)
    assert done.returncode != 0 and done.stderr.count(f'error: image {bad}') == 1


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    config = small_config(tmp_path, epochs=200, checkpoint_steps=1)
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not find_checkpoints(tmp_path / 'run' / 'last') and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert 'stopped by SIGINT: continue with --resume' in err and 'Traceback' not in err
    assert damage(find_checkpoints(tmp_path / 'run' / 'last')[0]) is None


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs /proc')
def test_sigterm_to_the_launcher_of_one_process(tmp_path):
    """accelerate dies of it and tells its child nothing; the run must not go on alone."""
    config = small_config(tmp_path, epochs=500, checkpoint_steps=1)
    module = command(config)[1:]
    process = subprocess.Popen(launch_command(1, *module), env=launch_env(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not find_checkpoints(tmp_path / 'run' / 'last') and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert 'stopped by SIGTERM: continue with --resume' in process.communicate(timeout=60)[1]
    assert damage(find_checkpoints(tmp_path / 'run' / 'last')[0]) is None


@pytest.mark.slow
def test_full_disk_ends_with_code_2_and_the_checkpoint_before(tmp_path):
    """The limit on the size of a file lets the first small run through and stops the second one."""
    config = small_config(tmp_path, epochs=1)
    train(config)
    good = find_checkpoints(tmp_path / 'run' / 'last')[0]
    limited = f'ulimit -f 100; exec {" ".join(command(resumed(config, epochs=2)))}'
    done = subprocess.run(['bash', '-c', limited], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: cannot write ')
    assert find_checkpoints(tmp_path / 'run' / 'last') == [good] and damage(good) is None
    assert train(resumed(config, epochs=2))['epochs'] == 2


@pytest.mark.slow
def test_ten_kills_on_two_processes(tmp_path):
    """SIGKILL at random times to a launch of two processes, ten times, against an undisturbed run."""
    options = {**RANDOM, 'batch_size': 2, 'epochs': 40, 'checkpoint_steps': 3}
    whole = small_config(tmp_path, experiment='whole', **options)
    broken = replace(whole, experiment='broken')
    path = tmp_path / 'run.yaml'
    path.write_text(to_yaml(whole))
    module = ('-m', 'timm_spinal.train', '--config', str(path), '--log-interval', '1000')
    subprocess.run(launch_command(2, *module), env=launch_env(), check=True, stdout=subprocess.DEVNULL)
    rng = random.Random(0)
    kills = 0
    again = launch_command(2, *module, '--experiment', 'broken', '--resume', 'auto')
    while kills < 10:
        process = subprocess.Popen(again, env=launch_env(), stdout=subprocess.PIPE, text=True, start_new_session=True)
        for line in process.stdout:
            if line.startswith('epoch '):
                break
        time.sleep(rng.random())
        assert process.poll() is None, f'the run ended before kill {kills + 1}'
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        kills += 1
    subprocess.run(again, env=launch_env(), check=True, stdout=subprocess.DEVNULL)
    assert_same_state(whole, broken)
