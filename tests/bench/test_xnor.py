"""What `timm-spinal bench xnor` measures."""

import pytest
import torch

from timm_spinal.bench import xnor
from timm_spinal.errors import UserError
from timm_spinal.layers import xnor_backend
from timm_spinal.layers.xnor import pack_signs

built = pytest.mark.skipif(xnor_backend() == 'torch', reason='the C code is not built')


@built
def test_both_products_give_the_same():
    case = xnor.Case(capsules=6, classes=5, batch=3)
    theirs, sums = (call() for call in xnor.projector_calls(case))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 8, generator=g).relu()
    scale = pack_signs(0.1 * torch.randn(6, 5, 8, 16, generator=g))[1]
    ours = sums * x.mean(2).view(3, 6, 1, 1) * scale
    torch.testing.assert_close(ours, theirs.view(6, 3, 5, 16).transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('layer', xnor.LAYERS)
@torch.no_grad()
def test_heads_give_the_same(layer):
    calls = xnor.head_calls(layer, xnor.Case(capsules=6, classes=5, batch=3))
    assert len(calls) == (3 if layer == 'xnodr' else 2)
    torch.testing.assert_close(calls[-1](), calls[0](), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('layer', xnor.LAYERS)
def test_prints_a_line_for_each_case(layer, capsys):
    argv = ['--layer', layer, '--capsules', '6', '--classes', '3', '-b', '2', '--threads', '1', '--models']
    assert xnor.main([*argv, '--seconds', '0']) in (0, 1)
    first, heading, row, counts = capsys.readouterr().out.splitlines()
    assert f'{layer}, bits by {xnor_backend()}' in first
    fields = row.replace('missed', '').split()
    assert fields[:3] == ['6', '3', '2'] and len(fields) == (11 if layer == 'xnodr' else 9)
    assert all(float(f) > 0 for f in fields if f != '-')
    assert '6 capsules, 3 classes: projector 2,304 MACs, or 2,304 bit products (36 OPs' in counts
    torch.set_num_threads(1)


def test_share_of_a_network(capsys):
    xnor.print_share('test_resnet_xnodr', classes=3, batch=1, seconds=0.)
    line = capsys.readouterr().out
    assert line.startswith('test_resnet_xnodr, 3 classes, batch 1: float ') and '% of the float time' in line


@pytest.mark.parametrize('argv, message', [
    (['--classes', '10', '1'], '--classes: must be at least 2, got 1'),
    (['-b', '0'], '--batch-size: must be at least 1, got 0'),
])
def test_bad_values(argv, message):
    with pytest.raises(UserError, match=message):
        xnor.main(argv)
