"""Loader workers of every kind of run: killed ones, and ones that are not forked."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from timm_spinal.cli import guard
from timm_spinal.compare.cli import main as compare
from timm_spinal.detection import data as detection_data
from timm_spinal.detection.problem import train_detector
from timm_spinal.errors import UserError, dead_workers_named
from timm_spinal.training.dataset import Split
from timm_spinal.training.train import train
from timm_spinal.validate import run as validate

from ..detection.test_problem import small_config as detection_config
from .images import make_folder
from .runs import small_config

FEATURES = ['--backbone', 'test_resnet', '--img-size', '32', '--heads', 'linear', '--seeds', '1', '--epochs', '1',
            '--head-batch-size', '4']
KINDS = ['train', 'train-detection', 'validate', 'compare']


def start(kind: str, folder: Path, workers: int):
    """A run of each kind, small."""
    images = folder / 'images'
    if not images.exists():
        make_folder(images, ('train', 'validation', 'test'), per_class=11, size=36)
    flags = ['--data-dir', str(images), '-j', str(workers)]
    if kind == 'train':
        return train(small_config(folder, epochs=1, workers=workers, aa='rand-m9-mstd0.5', mixup=0.4, reprob=0.3,
                                  data_on_device='never'))
    if kind == 'train-detection':
        return train_detector(detection_config(folder, epochs=1, workers=workers, experiment='detector'))
    if kind == 'validate':
        torch.manual_seed(0)
        return validate(['--model', 'test_resnet', '--num-classes', '2', '--img-size', '32', '-b', '8', *flags,
                         '--results-file', str(folder / 'results.json')])
    return compare([*FEATURES, *flags, '--output', str(folder / 'compare')])


@pytest.mark.parametrize('kind', KINDS)
def test_killed_worker_is_one_line(tmp_path, monkeypatch, capfd, kind):
    """As the kernel kills it where memory ends; what it says to do is possible."""
    def die(*args):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Split, 'read', die)
        patch.setattr(detection_data, 'read_image', die)
        assert guard(lambda argv: start(kind, tmp_path, 2), []) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and lines[0].startswith('error: loader worker ') and 'Traceback' not in lines[0]
    assert 'most likely the machine is out of memory; use fewer --workers or a smaller --batch-size, then ' in lines[0]
    if kind.startswith('train'):
        experiment = 'run' if kind == 'train' else 'detector'
        assert lines[0].endswith(f'then continue with --resume auto --experiment {experiment}')


@pytest.mark.slow
def test_run_goes_on_after_a_worker_was_killed(tmp_path, monkeypatch, capfd):
    config = small_config(tmp_path, epochs=2, workers=1, checkpoint_steps=1, data_on_device='never')
    read, reads = Split.read, []

    def die_later(self, index):
        reads.append(index)
        if len(reads) > 12:  # of one worker, in its third batch
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Split, 'read', die_later)
        assert guard(lambda argv: train(config), []) == 2
    assert '--resume auto --experiment run' in capfd.readouterr().err
    train(replace(config, resume='auto'))
    whole = train(replace(config, experiment='whole'))
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert (result['loss'], result['updates']) == (whole['loss'], whole['updates'])


NOT_FORKED = """
import sys
from multiprocessing import set_forkserver_preload, set_start_method
from pathlib import Path
set_start_method(sys.argv[1])
if sys.argv[1] == 'forkserver':  # so that its workers need not import all of it again
    set_forkserver_preload(['timm_spinal.detection.data', 'timm_spinal.compare.features'])
from tests.training.test_workers import start
for kind in sys.argv[3:]:
    start(kind, Path(sys.argv[2]), 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize('method, kinds', [
    ('forkserver', KINDS), ('spawn', KINDS)])
def test_workers_that_are_not_forked_give_the_same(tmp_path, method, kinds):
    """As on macOS and Windows (spawn) and from Python 3.14 on (forkserver): all that workers get is pickled."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, '-c', NOT_FORKED, method, str(tmp_path / method), *kinds], capture_output=True, text=True,
        cwd=root, env=dict(os.environ, PYTHONPATH=root))
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in kinds:
        start(kind, tmp_path / 'here', 0)
    one, other = tmp_path / method, tmp_path / 'here'
    for file, keys in (('run/result.json', ('loss', 'top1')), ('detector/result.json', ('ap', 'ap50', 'ap_large')),
                       ('compare/runs/linear/seed-0/result.json', ('loss', 'test_loss'))):
        a, b = (json.loads((folder / file).read_text()) for folder in (one, other))
        assert [a[key] for key in keys] == [b[key] for key in keys]
    a, b = (json.loads((folder / 'results.json').read_text())[0] for folder in (one, other))
    assert a['loss'] == b['loss'] and a['images'] == 22
    for name in ('train-0-00000', 'test-0-00000'):
        a, b = (load_file(folder / 'compare' / 'features' / f'{name}.safetensors') for folder in (one, other))
        assert torch.equal(a['pooled'], b['pooled']) and torch.equal(a['labels'], b['labels'])


@pytest.mark.parametrize('error', [ConnectionResetError, EOFError])
def test_a_worker_that_dies_while_its_batch_is_fetched_is_named(error):
    def rebuild_storage_fd():  # as torch's, which asks the worker for a file descriptor
        raise error('gone')

    said = 'a loader worker was killed: .* use fewer --workers .*, then run it again'
    with pytest.raises(UserError, match=said), dead_workers_named(lambda: 'run it again'):
        rebuild_storage_fd()
    with pytest.raises(error), dead_workers_named(lambda: ''):
        raise error('of something else')
