import pytest
import torch

from timm_spinal.compare import products
from timm_spinal.compare.products import fast_float32_products


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def error(a, b):
    exact = a.double() @ b.double().t()
    return float(((a @ b.t()).double() - exact).abs().max() / exact.abs().max())


def test_products_stay_float32():
    """Whatever this processor has: errors of float32, and torch's setting as it was afterwards."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 1152, generator=generator), torch.randn(200, 1152, generator=generator)
    torch.set_float32_matmul_precision('highest')
    with fast_float32_products():
        assert error(a, b) < 1e-5
    assert torch.get_float32_matmul_precision() == 'highest'


@pytest.mark.parametrize('found, expected', [(1e-6, 'medium'), (1e-3, 'highest')])
def test_taken_only_where_they_are(found, expected, monkeypatch):
    monkeypatch.setattr(products, '_product_error', lambda: found)
    torch.set_float32_matmul_precision('highest')
    with fast_float32_products():
        assert torch.get_float32_matmul_precision() == expected


@pytest.mark.parametrize('chosen', ['high', 'medium'])
def test_a_choice_of_the_user_stays(chosen, monkeypatch):
    monkeypatch.setattr(products, '_product_error', lambda: pytest.fail('measured in vain'))
    torch.set_float32_matmul_precision(chosen)
    with fast_float32_products():
        assert torch.get_float32_matmul_precision() == chosen


def test_setting_comes_back_after_an_error():
    torch.set_float32_matmul_precision('highest')
    with pytest.raises(KeyError), fast_float32_products():
        raise KeyError
    assert torch.get_float32_matmul_precision() == 'highest'


def test_error_of_lower_precision_is_seen(monkeypatch):
    """The measure tells bfloat16 from float32."""
    assert products._product_error() < products.LARGEST_ERROR
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: matmul(
        a.bfloat16().float() if a.dtype == torch.float32 else a, b))
    assert products._product_error() > 10 * products.LARGEST_ERROR
