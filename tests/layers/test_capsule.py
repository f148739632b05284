"""squash, sign, xnorize: values, gradients, the two traps of the paper."""

import pytest
import torch

from timm_spinal.layers import sign_ste, squash, xnorize
from timm_spinal.layers.capsule import length


def test_squash_value():
    s = torch.tensor([[3., 4.]])
    torch.testing.assert_close(squash(s), 25. / 26. * s / 5.)


def test_squash_of_zero_has_zero_value_and_gradient():
    s = torch.zeros(2, 8, requires_grad=True)
    v = squash(s)
    v.sum().backward()
    assert torch.equal(v, torch.zeros(2, 8)) and torch.equal(s.grad, torch.zeros(2, 8))


def test_length_of_zero_has_a_finite_gradient():
    v = torch.zeros(2, 8, requires_grad=True)
    length(v).sum().backward()
    assert torch.equal(v.grad, torch.zeros(2, 8))


@pytest.mark.parametrize('function', [squash, length])
def test_gradcheck(function):
    torch.manual_seed(0)
    s = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (s,))


def test_squash_of_large_half_floats_does_not_overflow():
    s = torch.full((1, 16), 300., dtype=torch.float16)
    v = squash(s)
    assert v.dtype == torch.float16
    torch.testing.assert_close(length(v), torch.ones(1, dtype=torch.float16), atol=1e-2, rtol=0.)


def test_sign_of_zero_is_minus_one():
    x = torch.tensor([-2., -0., 0., 1e-30, 3.])
    assert sign_ste(x).tolist() == [-1., -1., -1., 1., 1.]


def test_straight_through_gradient_has_inclusive_bounds():
    x = torch.tensor([-1.5, -1., -0.2, 0., 1., 1.0001], requires_grad=True)
    upstream = torch.tensor([1., 2., 3., 4., 5., 6.])
    sign_ste(x).backward(upstream)
    assert x.grad.tolist() == [0., 2., 3., 4., 5., 0.]


def test_straight_through_gradient_is_that_of_the_clip():
    """The estimator is defined as the gradient of clip(x, -1, 1), which finite differences can check."""
    torch.manual_seed(0)
    x = (2. * torch.randn(40, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(40, dtype=torch.float64)
    (estimated,) = torch.autograd.grad(sign_ste(x), x, upstream)
    clip = torch.autograd.functional.jacobian(lambda t: t.clamp(-1., 1.), x)
    assert torch.autograd.gradcheck(lambda t: t.clamp(-1., 1.), (x,))
    torch.testing.assert_close(estimated, upstream @ clip)


def test_xnorize_scales_by_the_mean_without_gradient():
    x = torch.tensor([[1., -2.], [-3., 0.5]], requires_grad=True)
    y = xnorize(x, 0)
    torch.testing.assert_close(y, torch.tensor([[2., -1.25], [-2., 1.25]]))
    y.sum().backward()
    assert x.grad.tolist() == [[2., 0.], [0., 1.25]]  # scale times mask, nothing through the scale
