"""What training costs on the device: peak memory, and images per second beside timm's loop in turns in one run."""
import statistics

import pytest
import timm
import torch

from timm_spinal.bench import loops
from timm_spinal.bench.runner import MIB, Setting, paired_ratio, seconds_in_turns

from .conftest import DEVICE

QUICK = DEVICE == 'cpu'  # to see that these tests run
BATCH, SIDE = (2, 64) if QUICK else (64, 224)


def step_of(name: str, classes: int):
    """A training step in bfloat16, channels last, and what the weights and their gradients take in MiB."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).to(DEVICE, memory_format=torch.channels_last).train()
    x = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            y = model(x)
        loss = y.float().square().mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
        model.zero_grad()
        return finite and bool(loss.isfinite())

    return step, sum(p.numel() * p.element_size() for p in model.parameters()) / MIB


def peak(step) -> float:
    """MiB that a step takes beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


@pytest.mark.parametrize('name, plain, classes, limit', [
    # the routing keeps within the free memory, whatever the classes
    ('resnet50_xnodr', 'resnet50', 1000, None),
    # a collision keeps one more map than a convolution
    ('icresnet50', 'resnet50', 1000, 3.),
    ('resnet34_sb_s32u1', 'resnet34', 1000, 2.),
])
def test_peak_memory_of_training(record, name, plain, classes, limit):
    """Beside the plain model."""
    step, weights = step_of(name, classes)
    assert step()  # what is made once
    if QUICK:
        return
    found = peak(step)
    del step
    other, _ = step_of(plain, classes)
    other()
    against = peak(other)
    setting = f'batch {BATCH}, {SIDE} px, {classes} classes, bfloat16, channels last'
    record(f'memory/{name}', name, 'peak memory of a training step', found, 'MiB', setting)
    ratio = found / against
    record(f'memory/{name}/{plain}', f'{name} / {plain}', 'peak memory of a training step', ratio, '', setting)
    total = torch.cuda.get_device_properties(0).total_memory / MIB
    assert weights < found < total
    if limit is not None:
        assert ratio < limit


# at least so much of timm's images per second; at 32 px its loader is what both wait for
SPEEDS = [('resnet50', 224, 128, 0.95), ('resnet18_pspinal', 32, 256, 0.9)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('model, side, batch, least', SPEEDS, ids=lambda value: str(value))
def test_images_per_second_beside_timm(record, model, side, batch, least, compiled):
    if QUICK:
        model, side, batch = 'test_resnet', 32, 4
    setting = Setting(batch_size=batch, img_size=side, rounds=2 if QUICK else 7, warmup=2, workers=0 if QUICK else 14,
                      device=DEVICE)
    sides = [make(setting, model) for make in (loops.our_epochs, loops.timm_epochs)]
    if compiled:
        for epochs in sides:
            epochs.model.compile(backend='aot_eager' if QUICK else 'inductor')

    def waited(call):
        def epoch():
            call()
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
        return epoch

    ours, timms = seconds_in_turns(*map(waited, sides), setting)
    ratio = paired_ratio(timms, ours)
    images, how = loops.BATCHES * batch, 'compiled' if compiled else 'eager'
    text = f'batch {batch}, {side} px, {how}, float32, {setting.workers} workers, JPEGs'
    for who, seconds in (('ours', ours), ('timm', timms)):
        record(f'speed/{model}/{side}/{how}/{who}', f'{model}, {who}', 'images per second',
               images / statistics.median(seconds), '1/s', text)
    record(f'speed/{model}/{side}/{how}', f'{model}, ours / timm', 'images per second', ratio.median, '', text)
    assert len(ours) == len(timms) == setting.rounds
    assert QUICK or ratio.median >= least
