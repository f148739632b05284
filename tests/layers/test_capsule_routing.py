"""Dynamic routing against the paper's equations, both memory modes, gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from timm_spinal.layers import CapsuleRouting, capsule_routing, create_head, dynamic_routing, sign_ste, squash
from timm_spinal.layers.capsule_routing import WHOLE_LIMIT, _route, classes_per_chunk, limits

KINDS = {'caps': (False, False), 'xnodr': (True, False), 'xnidr': (False, True)}


def inputs(batch=3, capsules=6, classes=5, d=8, dim=16, dtype=torch.float64):
    """Half of the inputs are exactly zero, as behind a ReLU."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, capsules, d, generator=g, dtype=dtype).relu()
    return x, 0.7 * torch.randn(capsules, classes, d, dim, generator=g, dtype=dtype)


def sgn(x):
    return torch.where(x > 0, 1., -1.).to(x)


def predictions(x, w, xnor):
    """u_hat[b,i,j,e], written out as in docs/papers/xnodr_xnidr.md, section 3."""
    if not xnor:
        return (x[:, :, None, :, None] * w[None]).sum(3)
    products = (sgn(x)[:, :, None, :, None] * sgn(w)[None]).sum(3)
    return products * x.abs().mean(2)[:, :, None, None] * w.abs().mean(2)[None]


def reference(x, w, iterations, xnor_projector, xnor_agreement):
    u = predictions(x, w, xnor_projector)
    logits = torch.zeros(u.shape[:3], dtype=x.dtype)
    for _ in range(iterations):
        c = logits.softmax(2)
        s = (c[..., None] * u).sum(1)
        n2 = (s * s).sum(2, keepdim=True)
        v = n2 / (1 + n2) * s / n2.sqrt()
        if xnor_agreement:
            same = (sgn(u) * sgn(v)[:, None]).sum(3)
            logits = logits + same * u.abs().mean(3) * v.abs().mean(2)[:, None]
        else:
            logits = logits + (u * v[:, None]).sum(3)
    return v


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('iterations', [1, 2, 3, 4])
def test_follows_the_equations(kind, iterations):
    x, w = inputs()
    expected = reference(x, w, iterations, *KINDS[kind])
    for memory in ('whole', 'lean'):
        torch.testing.assert_close(dynamic_routing(x, w, iterations, *KINDS[kind], memory), expected)


def test_kinds_differ_where_they_should():
    x, w = inputs()
    one = {kind: dynamic_routing(x, w, 1, *flags) for kind, flags in KINDS.items()}
    three = {kind: dynamic_routing(x, w, 3, *flags) for kind, flags in KINDS.items()}
    assert torch.equal(one['xnidr'], one['caps'])  # with one iteration there is no agreement
    torch.testing.assert_close(one['xnodr'], squash(predictions(x, w, True).sum(1) / 5))  # a uniform average
    assert (three['xnidr'] - three['caps']).abs().max() > 1e-3
    assert (one['xnodr'] - one['caps']).abs().max() > 1e-2


def test_xnorized_products_are_whole_numbers():
    x, w = inputs(capsules=7, classes=3, dim=5)
    products = torch.einsum('bik,ijkd->bijd', sign_ste(x), sign_ste(w))
    assert torch.equal(products, predictions(sgn(x), sgn(w), False))
    assert set(products.unique().tolist()) <= {-8., -6., -4., -2., 0., 2., 4., 6., 8.}


def test_gradient_of_the_xnorized_weight():
    """dL/dW = sgn(x) K_x alpha_W 1(|W| <= 1) dL/du_hat, summed over the batch; nothing through K_x and alpha_W."""
    x, w = inputs()
    w[0, 0, :2] = torch.tensor([1., -1.], dtype=w.dtype)[:, None]  # the bound itself
    w[0, 0, 2] = 1.01
    w.requires_grad_()
    upstream = torch.randn(3, 5, 16, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(dynamic_routing(x, w, 1, True, False), w, upstream)
    u = predictions(x, w.detach(), True).requires_grad_()
    (du,) = torch.autograd.grad(squash(u.sum(1) / 5), u, upstream)
    scaled = (sgn(x) * x.abs().mean(2, keepdim=True))[:, :, None, :, None] * w.detach().abs().mean(2, keepdim=True)
    expected = (scaled * du[:, :, :, None, :]).sum(0) * (w.detach().abs() <= 1)
    torch.testing.assert_close(found, expected)
    assert found[0, 0, :2].abs().min() > 0 and (found[0, 0, 2] == 0).all()


def test_gradcheck_of_float_routing():
    x, w = inputs(batch=2, capsules=3, classes=3, d=2, dim=3)
    x, w = (x + 0.1).requires_grad_(), w.requires_grad_()
    for memory in ('whole', 'lean'):
        assert torch.autograd.gradcheck(lambda a, b, m=memory: dynamic_routing(a, b, 3, False, False, m), (x, w))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('chunk', [1, 2, 3, 7])
def test_lean_equals_whole(kind, chunk):
    results = []
    for size in (0, chunk):
        x, w = (t.requires_grad_() for t in inputs(classes=7, dtype=torch.float32))
        v = _route(x, w, 3, *KINDS[kind], size)
        v.cos().sum().backward()
        results.append((v, x.grad, w.grad))
    for whole, lean in zip(*results):
        torch.testing.assert_close(lean, whole, atol=1e-5, rtol=1e-5)


def test_memory_is_chosen_by_size():
    assert classes_per_chunk(64, 256, 10, 16, 'auto') == 0
    assert classes_per_chunk(64, 256, 1000, 16, 'auto') == 8
    assert classes_per_chunk(64, 256, 1000, 16, 'whole') == 0
    assert classes_per_chunk(1, 4, 10, 16, 'lean') == 10
    assert classes_per_chunk(10 ** 6, 256, 10, 16, 'auto') == 1
    assert WHOLE_LIMIT // (64 * 256 * 16) == 64


CUDA = torch.device('cuda', 0)


@pytest.mark.parametrize('free, batch, chunk', [
    (2 ** 36, 64, 0), (2 ** 36, 256, 0),  # of 64 GiB 4 may be predictions, and 256 images have 3.9
    (2 ** 36, 512, 64), (2 ** 33, 64, 512), (2 ** 33, 256, 128), (0, 64, 512), (2 ** 36, 2 ** 20, 1),
])
def test_memory_is_chosen_by_device(monkeypatch, free, batch, chunk):
    """On CUDA by what is free; chunks there have 256 MiB and more."""
    monkeypatch.setattr(capsule_routing, '_free_memory', lambda device: free)
    found = classes_per_chunk(batch, 256, 1000, 16, 'auto', *limits(CUDA))
    assert found == chunk
    assert not found or 4 * batch * 256 * found * 16 >= 2 ** 28
    assert classes_per_chunk(batch, 256, 1000, 16, 'auto', *limits(torch.device('cpu'))) == classes_per_chunk(
        batch, 256, 1000, 16, 'auto')


def test_free_memory_decides_once(monkeypatch):
    """What a process allocates later, or a resumed one before it first asks, changes nothing."""
    free = [50 * 2 ** 30]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free[0], 2 ** 36))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 2 ** 30)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 0)
    capsule_routing._free_memory.cache_clear()
    try:
        assert capsule_routing._free_memory(CUDA) == 2 ** 35
        free[0] = 2 ** 20
        assert capsule_routing._free_memory(CUDA) == 2 ** 35
    finally:
        capsule_routing._free_memory.cache_clear()


class Starts(TorchDispatchMode):
    """Counts the operators that start a kernel: all but views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [value.alias_info for value in function._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in returned)
        return function(*args, **kwargs or {})


def kernel_starts(batch, classes=1000, **kwargs) -> int:
    """Of forward and backward of the capsule layer of resnet50_xnodr, on tensors without data."""
    layer = CapsuleRouting(256, 8, classes, xnor_projector=True, device='meta', **kwargs)
    x = torch.empty(batch, 256, 8, device='meta', requires_grad=True)
    with Starts() as starts:
        layer(x).sum().backward()
    return starts.count


def test_kernel_starts(monkeypatch):
    """On a GPU the start of a kernel takes longer than what a CPU's chunk of 8 MiB gives it to compute."""
    on_cpu = kernel_starts(64, classes=100)  # 8 at a time
    monkeypatch.setattr(capsule_routing, '_free_memory', lambda device: 2 ** 36)
    monkeypatch.setattr(capsule_routing, 'limits', lambda device: limits(CUDA))
    whole, chunks = kernel_starts(256), kernel_starts(512)
    assert whole == kernel_starts(64, classes=100) == kernel_starts(64, memory='whole') < 200
    assert chunks < 20 * 250  # 64 classes at a time
    assert on_cpu > 13 * 200


def saved_elements(function) -> int:
    """Elements of the tensors that autograd keeps for the backward pass, each storage once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize('kind', KINDS)
def test_lean_keeps_no_predictions(kind):
    x, w = inputs(batch=32, capsules=8, classes=64, d=2, dtype=torch.float32)
    x.requires_grad_()
    predicted = 32 * 8 * 64 * 16
    assert saved_elements(lambda: _route(x, w, 3, *KINDS[kind], 0)) > predicted
    assert saved_elements(lambda: _route(x, w, 3, *KINDS[kind], 4)) < predicted / 2


@pytest.mark.parametrize('memory', ['whole', 'lean'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_routing(memory, dtype):
    x, w = inputs(dtype=torch.float32)
    expected = dynamic_routing(x, w, 3, False, False, memory)
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(dynamic_routing(x, w, 3, False, False, memory), expected)
        low = dynamic_routing(x.to(dtype), w, 3, False, False, memory)
    assert low.dtype == torch.float32  # that of the weights
    torch.testing.assert_close(low, expected, atol=0.02, rtol=0.02)
    assert dynamic_routing(x.to(dtype), w.to(dtype), 3, False, False, memory).dtype == dtype


@pytest.mark.parametrize('memory', ['auto', 'lean'])
def test_script_compile_export(memory):
    layer = CapsuleRouting(6, 8, 5, memory=memory).eval()
    x = inputs(dtype=torch.float32)[0]
    expected = layer(x)
    assert torch.equal(torch.jit.script(layer)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), expected)
    batch = torch.export.Dim('batch', min=2)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    more = inputs(batch=9, dtype=torch.float32)[0]
    torch.testing.assert_close(exported(more), layer(more))


@pytest.mark.slow
@pytest.mark.parametrize('head, memory', [('xnodr', 'auto'), ('xnidr', 'lean'), ('caps', 'lean')])
def test_heads_compile_with_a_dynamic_batch(head, memory):
    """Forward and gradients of other batch sizes, without a graph for each."""
    torch.manual_seed(0)
    net = create_head(head, 24, 5, capsule_dim=4, capsules=6, memory=memory)
    counted = CompileCounterWithBackend('aot_eager')
    torch._dynamo.reset()
    compiled = torch.compile(net, dynamic=True, fullgraph=True, backend=counted)
    for batch in (6, 9, 4, 11):
        x = torch.randn(batch, 24, 3, 3)
        found = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
        expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert counted.frame_count <= 2


def test_weights_start_as_keras_starts_them():
    layer = CapsuleRouting(128, 8, 10)
    assert layer.weight.shape == (128, 10, 8, 16)
    assert layer.weight.abs().max().item() == pytest.approx(0.01398, abs=1e-5)
    assert CapsuleRouting(256, 8, 10).weight.abs().max().item() == pytest.approx(0.00988, abs=1e-5)


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_classes=1), 'needs at least 2, got num_classes 1; use 2 classes'),
    (dict(num_classes=0), 'num_classes must be a positive'),
    (dict(num_classes=3, iterations=0), 'iterations must be a positive'),
    (dict(num_classes=3, memory='small'), "Unknown memory 'small'; use auto, whole, lean"),
])
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CapsuleRouting(4, 8, **kwargs)
