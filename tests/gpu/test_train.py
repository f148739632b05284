"""Runs on the device: precisions, options, exact resume, DDP and sharded weights."""
import csv
import math

import pytest
from safetensors.torch import load_file

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
    fsdp2_whole_load=(*FSDP, '2', '--fsdp_cpu_ram_efficient_loading', 'false'),
    fsdp1=(*FSDP, '1', '--fsdp_state_dict_type', 'SHARDED_STATE_DICT', '--fsdp_use_orig_params', 'true'),
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize('kind', LAUNCHES)
def test_launches_of_one_process(training, tmp_path, kind):
    """The same weights as without a launcher; a test split, and a resumed run."""
    if DEVICE == 'cpu' and kind != 'ddp':
        pytest.skip('one process with FSDP needs a GPU')
    launcher = LAUNCHES[kind]
    options = ('--model', 'resnet20_cifar', '--epochs', 2, '--clip-grad', 1)
    check(training('plain', *options))
    check(training('run', *options, launcher=launcher))
    assert difference(tmp_path / 'run', tmp_path / 'plain') < 1e-2
    training('run_in_parts', *options, '--stop-epoch', 1, launcher=launcher)
    check(training('run_in_parts', *options, '--resume', 'auto', launcher=launcher))
    tested = training(
        'tested', *options, '--val-split-fraction', 0.2, '--test-split', 'validation', launcher=launcher)
    check(tested, 16)
    assert tested['test_images'] == 40 and math.isfinite(tested['test_loss'])
