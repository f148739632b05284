"""Dropout on joined inputs: C code and torch give the same numbers, and take the same from the generator."""

import numpy as np
import pytest
import torch

from timm_spinal.layers import dropout_kernel
from timm_spinal.layers.dropout_kernel import draw_keep, join_and_drop, scale_kept

# rows and widths: fewer numbers than a draw gives; rows that end within a draw; more than one refill; an empty part
SIZES = [(1, [3]), (7, [5, 1, 3]), (3, [2048, 2049]), (50, [640, 512]), (4, [2, 0, 3]), (0, [4])]


@pytest.fixture(params=['c', 'torch'])
def backend(request, monkeypatch):
    if request.param == 'torch':
        monkeypatch.setattr(dropout_kernel, '_library', lambda: None)
    elif dropout_kernel._library() is None:
        pytest.skip('the C library was not built')


def generator():
    return np.random.Generator(np.random.SFC64(5))


@pytest.mark.parametrize('rows, widths', SIZES, ids=str)
@pytest.mark.parametrize('p', [0., 0.2, 0.5, 0.999999])
def test_result_is_that_of_a_mask_on_the_joined_parts(backend, rows, widths, p):
    torch.manual_seed(0)
    parts = [torch.randn(rows, w + 2)[:, 1:w + 1] for w in widths]
    ours, theirs = generator(), generator()
    kept = torch.from_numpy(draw_keep(p, rows * sum(widths), theirs)).view(rows, sum(widths))
    out, keep = join_and_drop(parts, p, ours)
    assert torch.equal(out, torch.cat(parts, 1) * (kept.float() * (1. / (1. - p))))
    assert torch.equal(keep.bool(), kept) and keep.max().item() <= 1 if rows else keep.shape == (0, sum(widths))
    assert ours.integers(2 ** 40) == theirs.integers(2 ** 40)  # what comes next


def test_transposed_parts_and_other_types(backend):
    x = torch.randn(6, 9).t()
    out, keep = join_and_drop([x, x], 0.5, generator())
    assert torch.equal(out, torch.cat([x, x], 1) * keep * 2.)
    double, kept = join_and_drop([x.double(), x.double()], 0.5, generator())
    assert double.dtype == torch.float64 and torch.equal(kept, keep) and torch.equal(double.float(), out)


def test_gradient_is_scaled_where_a_number_was_kept(backend):
    out, keep = join_and_drop([torch.ones(40, 30)], 0.25, generator())
    gradient = torch.randn(40, 12)
    expected = gradient * out[:, 18:]
    assert scale_kept(gradient, keep[:, 18:], 0.25) is gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0.)
    view = torch.randn(40, 24)[:, ::2]
    torch.testing.assert_close(scale_kept(view.clone(), keep[:, :12], 0.25), view * out[:, :12], rtol=1e-6, atol=0.)


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
def test_rate_and_scale(backend, p):
    out, keep = join_and_drop([torch.ones(1000, 100)], p, generator())
    assert abs(keep.float().mean().item() - (1. - p)) < 5. * (p * (1. - p) / 1e5) ** 0.5
    assert set(out.unique().tolist()) == {0., torch.tensor(1. / (1. - p)).item()}
