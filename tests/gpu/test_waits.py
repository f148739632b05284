"""Between two log lines no update waits for the device."""
import pytest

from .conftest import DEVICE
from .test_train import PSPINAL

pytestmark = pytest.mark.skipif(DEVICE == 'cpu', reason='torch reports waits of CUDA devices only')

# any wait in the updates 4 to 8 of 10 is an error: the first ones make the state of the optimizer and choose kernels
NO_WAITS = """
import torch
from timm_spinal.training import train as module
original, calls = module.train_batch, []

def train_batch(*args):
    calls.append(1)
    if len(calls) == 4:
        torch.cuda.set_sync_debug_mode('error')
    if len(calls) == 9:
        torch.cuda.set_sync_debug_mode('default')
    return original(*args)

module.train_batch = train_batch
"""
OPTIONS = ('--pin-mem', '--workers', 2)


@pytest.mark.parametrize('options', [
    (),
    ('--mixed_precision', 'bf16', '--channels-last', '--model-ema', '--mixup', 0.2, '--reprob', 0.3),
    ('--clip-grad', 1, '--grad-accum-steps', 2),
    ('--clip-grad', 0.1, '--clip-mode', 'value', '--opt', 'adamw', '--sched-on-updates'),
    ('--clip-grad', 0.02, '--clip-mode', 'agc'),
    ('--model', 'resnet18_xnodr', '--loss', 'margin', '--smoothing', 0),
    ('--model', 'resnet32_sb_s16u1_cifar', '--sb-ortho', 10),
], ids=['plain', 'bf16-ema-mixup-erasing', 'norm-accumulation', 'value-adamw', 'agc', 'margin', 'ortho'])
def test_no_update_waits(training, options):
    steps = 5 if '--grad-accum-steps' in options else 10
    result = training('run', *PSPINAL, '--epochs', 1, *OPTIONS, *options, before=NO_WAITS)
    assert result['updates'] == steps


def test_no_update_waits_for_a_teacher(training, tmp_path):
    training('teacher', '--model', 'resnet20_cifar', '--epochs', 1)
    for kind in ('wld', 'logit', 'feature'):
        result = training(
            kind, '--model', 'icresnet20_cifar', '--epochs', 1, *OPTIONS, '--kd-model-name', tmp_path / 'teacher',
            '--kd-distill-type', kind, before=NO_WAITS)
        assert result['updates'] == 10, kind
