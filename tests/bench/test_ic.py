import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

from timm_spinal.bench import ic
from timm_spinal.errors import UserError
from timm_spinal.layers import ICConv2d

SMALL = ic.Setting(batch_size=2, image_size=32, rounds=1)


def test_saved_bytes_of_one_collision():
    """The convolution keeps its input, the collision a byte per value, the box mean and its inputs."""
    x = torch.randn(2, 8, 6, 6).requires_grad_()
    plain, collided = (ic.saved_bytes(layer(8, 4, 3, bias=False), x) for layer in (nn.Conv2d, ICConv2d))
    assert plain == x.nbytes
    # mask, S, w' (a product of the parameter), and the mean over channels, which pooling keeps
    assert collided - plain == 2 * 4 * 16 + 4 * (2 * 16 + 4 + 2 * 36)


def test_times_and_sides():
    assert ic.plain_name('icresnet18') == 'resnet18'
    for folded in (False, True):
        ours, plain = ic.inference_times('icresnet18', SMALL, folded, compiled=False)
        assert len(ours) == len(plain) == 1 and min(*ours, *plain) > 0
    ours, plain = ic.training_times('icresnet18', SMALL, compiled=False)
    assert min(*ours, *plain) > 0


def test_memory_grows_with_the_batch():
    found = []
    for batch_size in (4, 32):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            found.append(pool.submit(ic.step_memory, 'icresnet18', batch_size, 32, 1).result())
    assert found[1].saved / found[0].saved == pytest.approx(8, rel=0.1)
    assert found[1].peak > found[1].saved > found[0].saved


def test_main_says_what_was_met(monkeypatch, capsys):
    monkeypatch.setattr(ic, 'inference_times', lambda *args: ([1.05], [1.]))
    monkeypatch.setattr(ic, 'training_times', lambda *args: ([1.3], [1.]))
    monkeypatch.setattr(ic, 'memory_of_both', lambda *args: (ic.Memory(110., 90.), ic.Memory(100., 80.)))
    assert ic.main([]) == 1
    out = capsys.readouterr().out
    assert out.count(': missed') == 1 and out.count(': met') == 2
    assert 'parameters 25,560,808 and 25,557,032; GMACs of convolutions and products 4.089 and 4.089' in out
    assert ic.main(['--skip', 'training']) == 0
    assert ic.main(['icresnet18']) == 0  # targets are those of icresnet50


@pytest.mark.parametrize('argv, text', [
    (['resnet50'], "'resnet50' is no ic<timm model>"),
    (['icresnet5'], "'icresnet5' is no ic<timm model>"),
    (['--rounds', '0'], '--rounds: must be at least 1, got 0'),
])
def test_bad_input(argv, text):
    with pytest.raises(UserError, match=text):
        ic.main(argv)
