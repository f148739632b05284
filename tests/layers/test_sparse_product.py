"""Products that pass over zeros give what dense ones give, in double precision to compare with."""
import pytest
import torch

from timm_spinal.layers import sparse_product as module
from timm_spinal.layers.sparse_product import can_multiply, sparse_product

# without the library nothing calls these: layers ask can_multiply, and test_joined_linear.py runs either way
needs_library = pytest.mark.skipif(module._library() is None, reason='no C library, or no AVX-512')

# M, K, N: one number; parts of a vector; one more than a list or a block takes; several of all
SIZES = [(1, 1, 64), (7, 15, 64), (512, 96, 128), (513, 97, 64), (1025, 300, 192), (3, 0, 64), (0, 5, 64)]


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@needs_library
@pytest.mark.parametrize('density', [0., 0.3, 1.])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_result_is_the_product(size, density):
    torch.manual_seed(0)
    m, k, n = size
    x = torch.randn(m, k) * (torch.rand(m, k) < density)
    b, bias, right = torch.randn(k, n), torch.randn(n), torch.randn(m, n)
    close(sparse_product(x, b), x.double() @ b.double())
    close(sparse_product(x, b, bias), x.double() @ b.double() + bias)
    close(sparse_product(x.t(), right), x.double().t() @ right.double())


@needs_library
def test_layouts():
    torch.manual_seed(0)
    wide = torch.randn(20, 70) * (torch.rand(20, 70) < 0.5)
    b, other = torch.randn(64, 35).t(), torch.randn(20, 64)
    close(sparse_product(wide[:, 3:38], b), wide[:, 3:38].double() @ b.double())
    close(sparse_product(wide[:, ::2], b), wide[:, ::2].double() @ b.double())
    close(sparse_product(wide[:, 3:38].t(), other), wide[:, 3:38].double().t() @ other.double())
    close(sparse_product(wide[:, ::2].t(), other), wide[:, ::2].double().t() @ other.double())


@needs_library
def test_zeros_hide_what_is_not_finite_and_nan_shows():
    x, b = torch.tensor([[0., 2.], [float('nan'), 0.]]), torch.ones(2, 64)
    b[0] = float('inf')
    found = sparse_product(x, b)
    assert torch.equal(found[0], torch.full((64,), 2.)) and found[1].isnan().all()


def test_what_it_takes(monkeypatch):
    x = torch.zeros(2, 3)
    assert not can_multiply(x.double(), 64) and not can_multiply(x, 65) and not can_multiply(x.to('meta'), 64)
    with pytest.raises(AssertionError, match='can_multiply'):
        sparse_product(x, torch.zeros(3, 65))
    assert can_multiply(x, 64) == (module._library() is not None)
    monkeypatch.setattr(module, '_library', lambda: None)
    assert not can_multiply(x, 64)
