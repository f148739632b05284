"""Bit arithmetic against floats: every path of the C code that this processor has, and torch where there is none."""

import pytest
import torch

from timm_spinal.layers import dynamic_routing, xnorize
from timm_spinal.layers.capsule import mean_abs
from timm_spinal.layers.xnor import library, ops, pack_signs, torch_twin

PATHS = library.xnor_paths()
# N, J, d, D, batch: the papers' 8 and 16; rows that are no multiple of 32 or 64; several bytes; more than a batch of 8;
# dimensions D that the C code leaves to torch; the largest d
SIZES = [(5, 3, 8, 16, 4), (6, 7, 5, 9, 5), (4, 33, 13, 16, 3), (3, 5, 24, 7, 11), (2, 2, 1, 1, 1), (3, 4, 8, 16, 9),
         (4, 5, 24, 32, 10), (2, 3, 127, 16, 2)]


@pytest.fixture(params=[*library.PATHS, 'torch'])
def backend(request, monkeypatch):
    if request.param not in PATHS:
        pytest.skip('not built or not on this processor')
    monkeypatch.setenv(library.ENVIRONMENT, request.param)
    return request.param


def sgn(x):
    return torch.where(x > 0, 1., -1.).to(x)


def inputs(capsules=6, classes=5, d=8, dim=16, batch=3):
    """Half of the inputs are exactly zero, as behind a ReLU, and so are some weights."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, capsules, d, generator=g).relu()
    weight = 0.7 * torch.randn(capsules, classes, d, dim, generator=g)
    weight[:, 0, 0] = 0.
    return x, weight


@pytest.mark.parametrize('size', SIZES)
def test_products_are_the_same_whole_numbers(size, backend):
    x, weight = inputs(*size)
    found = ops.xnodr_products(x, pack_signs(weight)[0])
    assert found.dtype == torch.int8 and found.is_contiguous()
    assert torch.equal(found.float(), torch.einsum('bik,ijkd->bijd', sgn(x), sgn(weight)))


@pytest.mark.parametrize('size', SIZES)
def test_packing_is_undone_by_unpacking(size):
    weight = inputs(*size)[1]
    bits, scale = pack_signs(weight)
    capsules, classes, d, dim, _ = size
    assert bits.dtype == torch.uint8 and bits.shape == (capsules, -(-d // 8), classes, dim)
    assert torch.equal(torch_twin.unpack_signs(bits, scale, d), xnorize(weight, 2))


def test_a_zero_is_a_minus(backend):
    bits, scale = pack_signs(torch.tensor([0., 1., -1., -0.]).view(1, 1, 4, 1))
    assert bits.item() == 0b0010
    x = torch.tensor([[[0., 0., 0., 1.]]])
    assert ops.xnodr_products(x, bits).item() == 1 - 1 + 1 - 1


@pytest.mark.parametrize('size', SIZES)
def test_predictions(size, backend):
    x, weight = inputs(*size)
    bits, scale = pack_signs(weight)
    found = ops.xnodr_products(x, bits) * mean_abs(x, 2).unsqueeze(3) * scale
    expected = torch.einsum('bik,ijkd->bijd', xnorize(x, 2), xnorize(weight, 2))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('size', [size for size in SIZES if size[1] > 1])
@pytest.mark.parametrize('iterations', [1, 2, 3, 4])
def test_routing(size, iterations, backend):
    x, weight = inputs(*size)
    found = ops.xnodr_routing(x, *pack_signs(weight), iterations)
    torch.testing.assert_close(found, dynamic_routing(x, weight, iterations, True, False), atol=1e-5, rtol=1e-5)
    found = ops.xnidr_routing(x, weight.transpose(1, 2).contiguous(), iterations)
    torch.testing.assert_close(found, dynamic_routing(x, weight, iterations, False, True), atol=1e-5, rtol=1e-5)


def test_more_classes_and_samples_than_the_kernel_takes_at_a_time(backend):
    x, weight = inputs(classes=100, capsules=20, batch=34)
    expected = torch.einsum('bik,ijkd->bijd', sgn(x), sgn(weight))
    assert torch.equal(ops.xnodr_products(x, pack_signs(weight)[0]).float(), expected)
    found = ops.xnodr_routing(x, *pack_signs(weight), 3)
    torch.testing.assert_close(found, dynamic_routing(x, weight, 3, True, False), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('threads', [1, 2, 3, 8])
def test_threads_change_nothing(threads, backend, monkeypatch):
    x, weight = inputs(batch=7)
    one = [ops.xnodr_routing(x, *pack_signs(weight), 3),
           ops.xnidr_routing(x, weight.transpose(1, 2).contiguous(), 3)]
    monkeypatch.setattr(library, 'GRAIN', 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    several = [ops.xnodr_routing(x, *pack_signs(weight), 3),
               ops.xnidr_routing(x, weight.transpose(1, 2).contiguous(), 3)]
    assert all(torch.equal(a, b) for a, b in zip(one, several))


def test_xnidr_in_parts_of_the_batch(backend, monkeypatch):
    x, weight = inputs(batch=7)
    projector = weight.transpose(1, 2).contiguous()
    whole = ops.xnidr_routing(x, projector, 3)
    monkeypatch.setattr(ops, 'CHUNK', 3 * 6 * 5 * 16)
    torch.testing.assert_close(ops.xnidr_routing(x, projector, 3), whole, atol=1e-6, rtol=1e-6)


def test_large_logits_and_dead_capsules(backend):
    x, weight = inputs(classes=40)
    x, weight = 30. * x, 30. * weight
    x[0] = 0.
    found = ops.xnodr_routing(x, *pack_signs(weight), 3)
    assert (found[0] == 0.).all() and found.isfinite().all()
    torch.testing.assert_close(found, dynamic_routing(x, weight, 3, True, False), atol=1e-5, rtol=1e-5)


def test_not_a_number_stays_one(backend):
    x, weight = inputs()
    x[1, 2, 3] = float('nan')
    found = ops.xnodr_routing(x, *pack_signs(weight), 3)
    assert found[1].isnan().all() and found[0].isfinite().all() and found[2].isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype, backend):
    x, weight = inputs()
    bits, scale = pack_signs(weight)
    found = ops.xnodr_routing(x.to(dtype), bits, scale.to(dtype), 3)
    assert found.dtype == dtype
    unpacked = torch_twin.unpack_signs(bits, scale.to(dtype).double(), 8)
    expected = dynamic_routing(x.to(dtype).double(), unpacked, 3, True)
    torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=1e-2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(ops.xnodr_routing(x, bits, scale, 3), ops.xnodr_routing(x, bits, scale, 3))
        found = ops.xnidr_routing(x, weight.transpose(1, 2).contiguous(), 3)
    torch.testing.assert_close(found, dynamic_routing(x, weight, 3, False, True), atol=1e-5, rtol=1e-5)


def test_strides_of_the_weights_do_not_matter(backend):
    x, weight = inputs()
    bits, scale = pack_signs(weight)
    expected = ops.xnodr_routing(x, bits, scale, 3)
    other = bits.to(memory_format=torch.channels_last)
    assert torch.equal(ops.xnodr_routing(x, other, scale, 3), expected)
    assert ops.xnodr_routing(x[:0], bits, scale, 3).shape == (0, 5, 16)


def test_operators_are_well_formed(backend):
    x, weight = inputs()
    bits, scale = pack_signs(weight)
    checks = ('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(ops.xnodr_products, (x, bits), test_utils=checks)
    torch.library.opcheck(ops.xnodr_routing, (x, bits, scale, 3), test_utils=checks)
    torch.library.opcheck(ops.xnidr_routing, (x, weight.transpose(1, 2).contiguous(), 3), test_utils=checks)


def test_there_is_no_gradient():
    x, weight = inputs()
    v = ops.xnodr_routing(x.requires_grad_(), *pack_signs(weight), 3)
    with pytest.raises(RuntimeError, match='has no gradient; train the float model'):
        v.sum().backward()


@pytest.mark.parametrize('change', [
    lambda x, bits, scale: (x[:, :5], bits, scale),
    lambda x, bits, scale: (x, bits[:, :, :4], scale),
    lambda x, bits, scale: (x, bits, scale[:5]),
    lambda x, bits, scale: (x[..., :0], bits, scale),
    lambda x, bits, scale: (x, bits.float(), scale),
    lambda x, bits, scale: (x.repeat(1, 1, 16), bits.repeat(1, 16, 1, 1), scale),
])
def test_sizes_that_do_not_fit_are_refused(change, backend):
    x, weight = inputs()
    with pytest.raises(ValueError, match='do not fit'):
        ops.xnodr_routing(*change(x, *pack_signs(weight)), 3)


def test_iterations_are_at_least_one(backend):
    x, weight = inputs()
    with pytest.raises(ValueError, match='at least 1, got 0'):
        ops.xnodr_routing(x, *pack_signs(weight), 0)
    with pytest.raises(ValueError, match='at least 1, got 0'):
        ops.xnidr_routing(x, weight.transpose(1, 2).contiguous(), 0)


def test_backend_by_the_environment(monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT, 'torch')
    assert library.xnor_backend() == 'torch'
    monkeypatch.setenv(library.ENVIRONMENT, 'auto')
    assert library.xnor_backend() == PATHS[-1]
    monkeypatch.setenv(library.ENVIRONMENT, 'fast')
    with pytest.raises(ValueError, match=r"TIMM_SPINAL_XNOR='fast' is unknown; use auto, .*torch\."):
        library.xnor_backend()
    monkeypatch.setattr(library, 'xnor_paths', lambda: ['torch', 'portable'])
    monkeypatch.setenv(library.ENVIRONMENT, 'avx2')
    with pytest.raises(ValueError, match="'avx2' is not built or not on this processor; use auto, portable, torch"):
        library.xnor_backend()


@pytest.mark.parametrize('content', [None, b'no library'])
def test_without_the_library(content, monkeypatch, tmp_path):
    """Not built, or built for another system: torch takes over."""
    x, weight = inputs()
    packed = pack_signs(weight)
    expected = ops.xnodr_routing(x, *packed, 3)
    spec = None
    if content is not None:
        (tmp_path / '_xnor.so').write_bytes(content)
        spec = type('Spec', (), {'origin': str(tmp_path / '_xnor.so')})
    monkeypatch.setattr(library.importlib.util, 'find_spec', lambda name: spec)
    _forget_library()
    try:
        assert library.xnor_backend() == 'torch'
        torch.testing.assert_close(ops.xnodr_routing(x, *packed, 3), expected, atol=1e-6, rtol=1e-6)
    finally:
        _forget_library()


def _forget_library():
    library._library.cache_clear()
    library.xnor_paths.cache_clear()
