"""Runs on the device: precisions, options, exact resume, DDP and sharded weights."""
import csv
import json
import math
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.detection.shapes import write_coco
from tests.training.images import make_mnist

from .conftest import DEVICE

HALF = ('--mixed_precision', 'fp16') if DEVICE == 'cuda' else ()
PRECISIONS = ('no', 'bf16', 'fp16') if DEVICE == 'cuda' else ('no', 'bf16')  # GradScaler needs a GPU
COMPILER = 'inductor' if DEVICE == 'cuda' else 'aot_eager'
PSPINAL = ('--model', 'resnet18_pspinal')
DETERMINISTIC = """
import torch
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.deterministic = True
"""
# ends as a kill would, after the checkpoint of update 14 of 20
KILLED = DETERMINISTIC + """
import os
from timm_spinal.training import train as module
original = module.save

def save(run):
    original(run)
    if run.progress.updates >= 14:
        os._exit(9)

module.save = save
"""


def difference(a, b) -> float:
    """Greatest difference of the best weights of two runs."""
    a, b = load_file(a / 'model.safetensors'), load_file(b / 'model.safetensors')
    assert a.keys() == b.keys() and a
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def check(result, updates: int = 20) -> None:
    assert result['updates'] == updates and result['best_epoch'] is not None
    assert math.isfinite(result['loss']) and 0. <= result['top1'] <= 100.
    assert result['hardware'].startswith(f'1 x {DEVICE} (')


@pytest.mark.parametrize('precision', PRECISIONS)
def test_precision(training, precision):
    result = training('run', *PSPINAL, '--epochs', 2, '--mixed_precision', precision, '--channels-last', '--model-ema',
                      '--mixup', 0.2)
    check(result)
    assert result['mixed_precision'] == precision


@pytest.mark.parametrize('options, updates', [
    (('--clip-grad', 0.02, '--clip-mode', 'agc'), 20),
    (('--grad-accum-steps', 2), 10),
    (('--model', 'resnet18_xnodr', '--loss', 'margin', '--smoothing', 0), 20),
    (('--model', 'resnet32_sb_s16u1_cifar', '--sb-ortho', 10), 20),
    (('--torchcompile', COMPILER, '--epochs', 1), 10),
], ids=['agc', 'accumulation', 'margin', 'ortho', 'compile'])
def test_options(training, options, updates):
    check(training('run', *PSPINAL, '--epochs', 2, *HALF, *options), updates)


def test_weak_logit_distillation(training, tmp_path):
    check(training('teacher', '--model', 'resnet20_cifar', '--epochs', 1), 10)
    result = training('student', '--model', 'icresnet20_cifar', '--epochs', 2, '--kd-model-name', tmp_path / 'teacher',
                      '--kd-distill-type', 'wld')
    check(result)
    with open(tmp_path / 'student' / 'summary.csv', newline='') as f:
        first, last = csv.DictReader(f)
    assert float(first['train_kd_loss']) > 0. and float(first['train_kd_weight']) > float(last['train_kd_weight'])


@pytest.mark.parametrize('kind, student', [('logit', 'resnet18_pspinal'), ('feature', 'resnet18_pspinal'),
                                           ('token', 'deit_tiny_distilled_patch16_224')])
def test_tasks_of_timm(training, tmp_path, kind, student):
    check(training('teacher', '--model', 'resnet20_cifar', '--epochs', 1), 10)
    check(training('student', '--model', student, '--epochs', 1, *HALF, '--kd-model-name', tmp_path / 'teacher',
                   '--kd-distill-type', kind), 10)


def test_images_with_two_classes(training, tmp_path):
    """Noise in the place of digits."""
    make_mnist(tmp_path / 'MNIST' / 'raw', train=64)
    result = training(
        'run', '--model', 'test_efficientnet_xnodr', '--dataset', 'multimnist', '--data-dir', tmp_path,
        '--img-size', 36, '--in-chans', 1, '--loss', 'margin', '--smoothing', 0, '--no-aug', '--epochs', 1)
    assert result['updates'] > 0 and math.isfinite(result['loss'])
    assert result['hardware'].startswith(f'1 x {DEVICE} (')


def test_detection(tmp_path):
    """Two epochs of four updates each."""
    data = write_coco(tmp_path / 'shapes', train=16, val=5)
    command = [
        sys.executable, '-m', 'timm_spinal.cli', 'train-detection', '--data-dir', data, '--backbone', 'test_resnet',
        '--fpn-channels', 16, '--anchor-scale', 4, '--min-size', 64, '--max-size', 96, '--batch-size', 4,
        '--workers', 0, '--epochs', 2, '--opt', 'adamw', '--lr', 1e-3, '--mixed-precision', 'bf16', '--debug',
        '--output', tmp_path, '--experiment', 'run']
    environment = dict(os.environ, **({'ACCELERATE_USE_CPU': 'true'} if DEVICE == 'cpu' else {}))
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['updates'] == 8 and result['hardware'].startswith(f'1 x {DEVICE} (')
    losses = [float(row['train_loss']) for row in csv.DictReader((tmp_path / 'run' / 'summary.csv').open())]
    assert all(map(math.isfinite, losses)) and losses[1] < losses[0]


@pytest.mark.parametrize('precision', [p for p in PRECISIONS if p != 'bf16'])
def test_resume_is_exact(training, tmp_path, precision):
    """With dropout on the device, killed inside the second epoch and resumed; with the scale of GradScaler."""
    options = ('--model', 'resnet18_spinal', '--epochs', 2, '--mixed_precision', precision, '--eval-metric', 'loss')
    check(training('whole', *options, before=DETERMINISTIC))
    assert training('part', *options, '--checkpoint-steps', 7, before=KILLED, code=9) == {}
    check(training('part', *options, '--checkpoint-steps', 7, '--resume', 'auto', before=DETERMINISTIC))
    assert difference(tmp_path / 'part', tmp_path / 'whole') == 0.


FSDP = ('-m', 'accelerate.commands.launch', '--num_processes', '1', '--main_process_port', '0', '--use_fsdp',
        '--fsdp_auto_wrap_policy', 'NO_WRAP', '--fsdp_version')
LAUNCHES = dict(
    ddp=('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1'),  # accelerate wants two for it
    fsdp2=(*FSDP, '2'),
    fsdp2_full=(*FSDP, '2', '--fsdp_state_dict_type', 'FULL_STATE_DICT'),
    fsdp2_offload=(*FSDP, '2', '--fsdp_offload_params', 'true'),
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize('kind', LAUNCHES)
def test_launches_of_one_process(training, tmp_path, kind):
    """The same weights as without a launcher; a test split, and a run that goes on exactly."""
    if DEVICE == 'cpu' and kind != 'ddp':
        pytest.skip('one process with FSDP needs a GPU')
    launcher = LAUNCHES[kind]
    options = ('--model', 'resnet20_cifar', '--epochs', 2, '--clip-grad', 1, '--keep', 'last')
    check(training('plain', *options))
    check(training('run', *options, launcher=launcher, before=DETERMINISTIC))
    assert difference(tmp_path / 'run', tmp_path / 'plain') < 1e-2
    training('run_in_parts', *options, '--stop-epoch', 1, launcher=launcher, before=DETERMINISTIC)
    check(training('run_in_parts', *options, '--resume', 'auto', launcher=launcher, before=DETERMINISTIC))
    assert difference(tmp_path / 'run_in_parts', tmp_path / 'run') == 0.
    tested = training(
        'tested', *options, '--val-split-fraction', 0.2, '--test-split', 'validation', launcher=launcher)
    check(tested, 16)
    assert tested['test_images'] == 40 and math.isfinite(tested['test_loss'])


def test_first_version_of_fsdp_is_refused(training):
    if DEVICE == 'cpu':
        pytest.skip('FSDP needs a GPU')
    training('run', '--model', 'resnet20_cifar', launcher=(*FSDP, '1'), code=1, said='FSDP of version 1')


@pytest.mark.parametrize('precision', [p for p in PRECISIONS if p != 'no'])
def test_fsdp2_in_half_precision(training, precision):
    if DEVICE == 'cpu':
        pytest.skip('FSDP needs a GPU')
    for name, model in (('layer_norm', 'vit_tiny_patch16_224'), ('batch_norm', 'resnet20_cifar')):
        check(training(name, '--model', model, '--epochs', 2, '--mixed_precision', precision,
                       launcher=LAUNCHES['fsdp2']))
