import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_spinal.layers import SharedBasisConv2d, SharedConv2d, basis_product, check_ranks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_conv(shared=5, unique=2, channels=6, out=7, **kwargs):
    """A decomposed convolution whose norms have seen something, negative weights included."""
    torch.manual_seed(1)
    conv = SharedBasisConv2d(channels, out, shared, unique, **kwargs)
    for norm in (conv.basis_norm, conv.norm):
        norm.weight.data.normal_()
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.)
    return conv


def batch_norm(x, norm):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    x = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None], mean


def test_product_has_the_unique_filters_first():
    x, unique, basis = randn(2, 6, 8, 8), randn(2, 6, 3, 3, seed=1), randn(5, 6, 3, 3, seed=2)
    x = x.to(memory_format=torch.channels_last)
    z = basis_product(x, unique, basis)
    torch.testing.assert_close(z[:, :2], F.conv2d(x, unique, padding=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[:, 2:], F.conv2d(x, basis, padding=1), rtol=1e-5, atol=1e-5)
    assert torch.equal(basis_product(x, unique, None), F.conv2d(x, unique, padding=1))
    assert torch.equal(basis_product(x, None, basis), F.conv2d(x, basis, padding=1))


def test_train_mode_is_basis_norm_coefficients_norm():
    conv, x, basis = random_conv().train(), randn(4, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    z, mean = batch_norm(F.conv2d(x, torch.cat([conv.unique, basis]), padding=1), conv.basis_norm)
    expected, _ = batch_norm(torch.einsum('tr,nrhw->nthw', conv.coeff.flatten(1), z), conv.norm)
    before = conv.basis_norm.running_mean.clone()
    torch.testing.assert_close(conv(x, basis), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.basis_norm.running_mean, 0.9 * before + 0.1 * mean.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('unique', [2, 9])
@pytest.mark.parametrize('dilation', [1, 2])
def test_eval_mode_folds_the_norms(unique, dilation):
    """The same numbers and gradients as the three steps one after the other."""
    conv, x = random_conv(unique=unique, dilation=dilation).eval(), randn(2, 6, 9, 9)
    basis = randn(5, 6, 3, 3, seed=2).requires_grad_()
    parameters = [basis, *conv.parameters()]
    z = F.conv2d(x, torch.cat([conv.unique, basis]), padding=dilation, dilation=dilation)
    expected = conv.norm(F.conv2d(conv.basis_norm(z), conv.coeff))
    got = conv(x, basis)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    weights = randn(*expected.shape, seed=3)
    expected_grads = torch.autograd.grad((expected * weights).sum(), parameters)
    grads = torch.autograd.grad((got * weights).sum(), parameters)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)


def test_effective_kernel_is_the_sum_over_the_basis():
    """W[t, c] = sum_r A[t, r] B[r, c] (docs/papers/shared_bases.md, section 2), with norms that do nothing."""
    conv, x, basis = SharedBasisConv2d(6, 7, 5, 2).double().eval(), randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    x, basis = x.double(), basis.double()
    conv.basis_norm.eps = conv.norm.eps = 0.
    kernel = torch.einsum('tr,rcij->tcij', conv.coeff.flatten(1), torch.cat([conv.unique, basis]))
    torch.testing.assert_close(conv(x, basis), F.conv2d(x, kernel, padding=1))


def test_other_norms_are_called():
    conv = SharedBasisConv2d(6, 7, 5, 1, norm_layer=lambda chs, **dd: nn.GroupNorm(1, chs, **dd)).eval()
    x, basis = randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    z = F.conv2d(x, torch.cat([conv.unique, basis]), padding=1)
    expected = conv.norm(F.conv2d(conv.basis_norm(z), conv.coeff))
    torch.testing.assert_close(conv(x, basis), expected, rtol=1e-4, atol=1e-5)


def test_folded_form_has_a_bias_and_no_norm():
    conv = SharedBasisConv2d(6, 7, 5, 2, folded=True)
    assert [name for name, _ in conv.named_parameters()] == ['unique', 'coeff', 'bias']
    x, basis = randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    conv.bias.data.normal_()
    z = F.conv2d(x, torch.cat([conv.unique, basis]), padding=1)
    torch.testing.assert_close(conv(x, basis), F.conv2d(z, conv.coeff, conv.bias), rtol=1e-4, atol=1e-5)


def test_init_is_kaiming_by_fan_out():
    """Expected squared norm of a unique filter 2 C / u (docs/papers/shared_bases.md, section 3)."""
    torch.manual_seed(0)
    conv = SharedBasisConv2d(64, 64, 32, 4)
    assert conv.unique.square().flatten(1).sum(1).mean().item() == pytest.approx(2 * 64 / 4, rel=0.05)
    assert conv.coeff.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('options', [{}, dict(unique=0), dict(shared=0)])
def test_scripts_and_traces(options, mode):
    conv = random_conv(**options).train(mode == 'train')
    shared = options.get('shared', 5)
    x, basis = randn(2, 6, 8, 8), randn(shared, 6, 3, 3, seed=2) if shared else None
    expected = conv(x, basis)
    torch.testing.assert_close(torch.jit.script(conv)(x, basis), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(conv)(x, basis), expected)


@pytest.mark.parametrize('shared, unique, message', [
    (0, 0, r'without shared \(S0\) and without unique filters \(U0\)'),
    (-1, 2, 'must not be negative'),
    (54, 1, '54 shared and 1 unique filters are more than the 54'),
])
def test_ranks_that_make_no_basis(shared, unique, message):
    with pytest.raises(ValueError, match=message):
        SharedBasisConv2d(6, 7, shared, unique)
    assert check_ranks(53, 1, 54) == 54


def test_shared_convolution_is_the_convolution():
    x, basis = randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    conv = SharedConv2d(6, 5, 3, dilation=2)
    assert not list(conv.parameters())
    assert torch.equal(conv(x, basis), F.conv2d(x, basis, padding=2, dilation=2))


# ---- folded, in inference ---------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """The operators that compute something, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            self.names.append(str(function.overloadpacket).removeprefix('aten.').replace('conv2d', 'convolution'))
        return function(*args, **kwargs or {})


def operators(function, *args):
    with Operators() as seen:
        function(*args)
    return seen.names


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_folded_filters_are_joined_once(context):
    conv, x, basis = SharedBasisConv2d(6, 7, 5, 2, folded=True).eval(), randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    expected = conv(x, basis).detach()
    with context():
        assert operators(conv, x, basis) == ['cat', 'convolution', 'convolution']
        assert operators(conv, x, basis.detach()) == ['convolution', 'convolution']
        assert torch.equal(conv(x, basis), expected)
    assert 'cat' in operators(conv, x, basis)  # with gradients


@pytest.mark.parametrize('change', [
    lambda conv, basis: conv.unique.mul_(2.),
    lambda conv, basis: basis.add_(1.),
    lambda conv, basis: conv.load_state_dict({k: v + 1. for k, v in conv.state_dict().items()}),
    lambda conv, basis: setattr(conv, 'unique', nn.Parameter(conv.unique + 1.)),
    lambda conv, basis: conv.double(),
], ids=['unique', 'basis', 'load', 'set', 'double'])
def test_changed_filters_are_joined_anew(change):
    conv, x, basis = SharedBasisConv2d(6, 7, 5, 2, folded=True).eval(), randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    with torch.no_grad():
        before = conv(x, basis)
        change(conv, basis)
        x, basis = (t.to(conv.coeff.dtype) for t in (x, basis))
        found = conv(x, basis)
    expected = conv(x, basis)  # with gradients nothing is kept
    torch.testing.assert_close(found, expected.detach())
    assert found.dtype != before.dtype or (found - before).abs().max() > 1e-3


def test_joined_filters_are_not_copied_or_saved():
    conv, x, basis = SharedBasisConv2d(6, 7, 5, 2, folded=True).eval(), randn(2, 6, 8, 8), randn(5, 6, 3, 3, seed=2)
    keys, size = set(conv.state_dict()), io.BytesIO()
    torch.save(conv, size)
    with torch.no_grad():
        expected = conv(x, basis)
    again = io.BytesIO()
    torch.save(conv, again)
    assert set(conv.state_dict()) == keys and len(again.getvalue()) == len(size.getvalue())
    other = copy.deepcopy(conv)
    assert other.joined.filters is None
    with torch.no_grad():
        assert torch.equal(other(x, basis), expected)
