import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from timm_spinal.errors import StopRequested, UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.distributed import Meter, NotFinite, SignalFlag, create_accelerator, set_backends


def test_flag_takes_the_first_signal_and_gives_the_handlers_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(1))
    try:
        with SignalFlag() as flag:
            assert flag.signum == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert flag.signum == signal.SIGTERM and not seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before, flags = signal.getsignal(signal.SIGTERM), []

    def enter():
        with SignalFlag() as flag:
            flags.append((flag.signum, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert flags == [(0, True)]


def test_stop_requested_names_the_signal():
    assert str(StopRequested(signal.SIGINT)) == 'stopped by SIGINT' and StopRequested(2).signum == 2


# ---- numbers of several processes -------------------------------------------------------------------------------

PROCESSES = """
import os, sys
import torch
from accelerate import Accelerator
from timm_spinal.training.distributed import Meter, SIGNAL_STEPS, SignalFlag, on_any_process, over_processes
accelerator = Accelerator(cpu=True)
me = accelerator.process_index
assert accelerator.num_processes == 2
assert over_processes(accelerator, [1. + me, 10.]) == [3., 20.]
assert over_processes(accelerator, [me, -me], highest=True) == [1., 0.]
assert on_any_process(accelerator, me == 1) and not on_any_process(accelerator, False)

# signals: only at every SIGNAL_STEPS-th update, and then in both
with SignalFlag() as flag:
    if me == 1:
        os.kill(os.getpid(), 15)
    answers = [flag.agreed(accelerator, update) for update in range(1, 2 * SIGNAL_STEPS + 1)]
    assert answers == ([0] * (SIGNAL_STEPS - 1) + [15]) * 2, answers
    assert flag.agreed(accelerator) == 15

# losses: means over the images of both, no operation on the device between two calls of flush
meter = Meter(accelerator, {})
for update in (1, 2):
    for batch in (1, 2):
        meter.add(dict(loss=torch.tensor(float(update + me)), other=torch.tensor(2.)), images=4 * (1 + me))
    meter.add_penalty('penalty', torch.tensor(3. + me))
    meter.close(update)
assert meter.last == {} and meter.sums == {}
meter.flush()
assert meter.last == dict(loss=(2 * 8 + 3 * 16) / 24, other=2., penalty=(3 * 8 + 4 * 16) / 24), meter.last
assert meter.sums == dict(images=48., loss=(1 + 2) * 8 + (2 + 3) * 16., other=96., penalty=2 * (3 * 8 + 4 * 16.))
assert meter.means()['loss'] == meter.sums['loss'] / 48
meter.flush()
print('both agree')
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / 'processes.py'
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)],
        env=dict(os.environ, ACCELERATE_USE_CPU='true'), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('both agree') == 2


# ---- fp16 -------------------------------------------------------------------------------------------------------


class Scaled:
    """What a meter looks at of an accelerator with a scaler."""
    num_processes = 1
    mixed_precision = 'fp16'

    def __init__(self, scale):
        self.scaler = scale and torch.amp.GradScaler('cpu', init_scale=scale)


def test_an_infinite_loss_under_fp16_is_left_out():
    meter = Meter(Scaled(2.), {})
    for update, loss in enumerate((1., math.inf, 3., math.nan), start=1):
        meter.add(dict(loss=torch.tensor(loss)), images=4)
        meter.close(update)
    meter.flush()
    assert meter.sums == dict(images=16., overflowed=8., loss=16.) and meter.means() == dict(loss=2.)
    assert math.isnan(meter.last['loss'])


def test_no_finite_loss_has_no_mean():
    meter = Meter(Scaled(2.), {})
    meter.add(dict(loss=torch.tensor(math.inf)), images=4)
    meter.close(1)
    meter.flush()
    assert math.isnan(meter.means()['loss'])


@pytest.mark.parametrize('scale, message', [
    (0.5, 'loss is inf at update 1, and the loss scale of fp16 has fallen to 0.5'), (None, None)])
def test_a_scaler_that_gave_up_ends_the_run(scale, message):
    """DeepSpeed has a scaler of its own, which ends the run itself."""
    meter = Meter(Scaled(scale), {})
    meter.add(dict(loss=torch.tensor(math.inf)), images=4)
    meter.close(1)
    if message is None:
        meter.flush()
        return
    with pytest.raises(NotFinite, match=message):
        meter.flush()


# ---- what a device can do faster --------------------------------------------------------------------------------


def test_accelerate_is_told_what_saves_time():
    accelerator = create_accelerator(TrainConfig(), [])
    assert accelerator.dataloader_config.non_blocking
    handler = accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and handler.broadcast_buffers and not handler.static_graph
    handler = create_accelerator(TrainConfig(no_ddp_bb=True, ddp_static_graph=True), []).ddp_handler
    assert not handler.broadcast_buffers and handler.static_graph


def test_a_static_graph_does_not_go_with_accumulation():
    with pytest.raises(UserError, match='--ddp-static-graph: does not go with gradient accumulation'):
        create_accelerator(TrainConfig(ddp_static_graph=True, grad_accum_steps=2), [])


@pytest.fixture
def backends():
    """The switches of PyTorch; put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    cudnn = torch.backends.cudnn
    yield lambda: (torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before[1:]


def test_backends_of_a_cuda_device(backends):
    before = backends()
    set_backends(TrainConfig(), torch.device('cpu'), same_shapes=True)
    assert backends() == before
    set_backends(TrainConfig(), torch.device('cuda'), same_shapes=True)
    assert backends() == ('high', True, True)
    set_backends(TrainConfig(matmul_precision='highest'), torch.device('cuda'), same_shapes=False)
    assert backends() == ('highest', False, False)
    torch.use_deterministic_algorithms(True)
    set_backends(TrainConfig(), torch.device('cuda'), same_shapes=True)
    assert backends() == ('high', False, True)
