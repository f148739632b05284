"""The C code of a convolution over a basis against torch's convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_spinal.layers import SharedBasisConv2d, shared_basis, shared_basis_kernel, shared_basis_op

# only AVX-512 has the C code; what torch computes instead is tested everywhere
needs_c = pytest.mark.skipif(shared_basis_kernel.library() is None, reason='no C code for this processor')
# u, s, C, T, H, W, kernel, dilation, batch: one tap vector and several; edges that no block of 6 pixels ends at; one
# pixel; a dilation that leaves most taps outside; channels that are no multiple of 16
SIZES = [(1, 8, 16, 16, 7, 5, 3, 1, 3), (2, 5, 9, 48, 8, 8, 3, 2, 2), (4, 3, 6, 64, 1, 1, 3, 1, 1),
         (8, 32, 20, 80, 4, 9, 3, 5, 2), (3, 7, 5, 128, 6, 6, 5, 1, 1), (6, 1, 33, 32, 3, 3, 1, 1, 4)]


def make(size, folded=False):
    u, s, chs, out, h, w, kernel, dilation, batch = size
    torch.manual_seed(0)
    conv = SharedBasisConv2d(chs, out, s, u, kernel, dilation, folded=folded).eval()
    for p in conv.parameters():
        p.data.normal_()
    for norm in () if folded else (conv.basis_norm, conv.norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.)
    conv.requires_grad_(False)
    x = torch.randn(batch, chs, h, w).to(memory_format=torch.channels_last)
    return conv, x, torch.randn(s, chs, kernel, kernel)


def reference(conv, x, basis):
    """In float64, step by step."""
    conv, x, basis = conv.double(), x.double(), basis.double()
    padding = conv.dilation * (conv.kernel_size // 2)
    z = F.conv2d(x, torch.cat([conv.unique, basis]), padding=padding, dilation=conv.dilation)
    if conv.basis_norm is None:
        return F.conv2d(z, conv.coeff, conv.bias)
    return conv.norm(F.conv2d(conv.basis_norm(z), conv.coeff))


@needs_c
@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('size', SIZES)
def test_same_numbers_as_the_convolutions(size, folded):
    conv, x, basis = make(size, folded)
    with torch.no_grad():
        assert conv.runs_in_c(x, basis)
        found = conv(x, basis)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = reference(conv, x, basis)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@needs_c
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_share_the_pixels(threads, monkeypatch):
    monkeypatch.setattr(shared_basis_op, 'GRAIN', 1)
    monkeypatch.setattr(shared_basis_op.torch, 'get_num_threads', lambda: threads)
    conv, x, basis = make(SIZES[0])
    with torch.no_grad():
        found = conv(x, basis)
    torch.testing.assert_close(found.double(), reference(conv, x, basis), rtol=1e-4, atol=1e-4)


def test_what_is_left_to_torch():
    conv, x, basis = make(SIZES[0])
    assert not conv.runs_in_c(x, basis)  # gradients could be asked for
    with torch.no_grad():
        assert not conv.runs_in_c(x.contiguous(), basis)
        assert not conv.runs_in_c(x.double(), basis)
        assert not conv.runs_in_c(x[:0], basis)
        with torch.autocast('cpu'):
            assert not conv.runs_in_c(x, basis)
        conv.norm.train()
        assert not conv.runs_in_c(x, basis)
        conv.norm = nn.GroupNorm(1, 16)
        assert not conv.runs_in_c(x, basis)
        other = make((9, 8, 16, 16, 7, 5, 3, 1, 3))[0]  # more unique filters than are few
        assert not other.eval().runs_in_c(x, basis)
        assert not make((1, 8, 16, 17, 7, 5, 3, 1, 3))[0].runs_in_c(x, basis)
        conv, x, basis = make(SIZES[0])
        conv, x, basis = make(SIZES[0], folded=True)
        conv.bias.data = conv.bias.data.double()  # one weight of another type
        assert not conv.runs_in_c(x, basis)
        conv, x, basis = make(SIZES[0])
        exported = torch.export.export(conv, (x, basis))
        assert 'shared_basis_conv' not in str(exported.graph)
        traced = torch.jit.trace(conv, (x, basis))
        assert 'shared_basis_conv' not in str(traced.inlined_graph)


def test_without_the_library(monkeypatch):
    conv, x, basis = make(SIZES[1])
    monkeypatch.setattr(shared_basis_kernel, 'library', lambda: None)
    with torch.no_grad():
        assert not conv.runs_in_c(x, basis)
        found = conv(x, basis)
    torch.testing.assert_close(found.double(), reference(conv, x, basis), rtol=1e-4, atol=1e-4)


@needs_c
def test_multiplications_are_counted_as_torchs(monkeypatch):
    conv, x, basis = make(SIZES[1])
    counts = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(shared_basis, 'can_run', lambda *args: False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            conv(x, basis)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 64 * (9 * 9 * (2 + 5) + 48 * (2 + 5))


@needs_c
def test_operator_is_well_formed():
    conv, x, basis = make(SIZES[1], folded=True)
    shortcut = torch.randn(2, 48, 8, 8)
    torch.library.opcheck(
        shared_basis_op.shared_basis_conv,
        (x, basis, conv.unique, conv.coeff, [conv.bias], [], 2, shortcut, True))


@needs_c
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('size', SIZES)
def test_shortcut_and_relu(size, packed):
    conv, x, basis = make(size)
    y = reference(conv, x, basis)
    shortcut = torch.randn(y.shape)
    conv.float()
    with torch.no_grad():
        given = shared_basis_kernel.pack(basis, x, conv.dilation) if packed else basis
        found = conv.run_in_c(x, given, shortcut, relu=True)
    expected = F.relu(y + shortcut)
    assert (expected == 0).any() and (expected > 0).any()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@needs_c
def test_relu_keeps_what_is_no_number():
    conv, x, basis = make(SIZES[0])
    x[0, 0, 0, 0] = float('nan')
    with torch.no_grad():
        found = conv.run_in_c(x, basis, relu=True)
    assert torch.equal(found.isnan(), conv.run_in_c(x, basis).isnan()) and found[0].isnan().any()


@needs_c
def test_a_packed_basis_is_unpacked_for_torch(monkeypatch):
    conv, x, basis = make(SIZES[1])
    with torch.no_grad():
        packed = shared_basis_kernel.pack(basis, x, conv.dilation)
        assert packed.is_mkldnn
        monkeypatch.setattr(shared_basis, 'can_run', lambda *args: False)
        found = conv(x, packed)
    torch.testing.assert_close(found.double(), reference(conv, x, basis), rtol=1e-4, atol=1e-4)
