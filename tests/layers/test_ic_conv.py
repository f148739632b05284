"""ICConv2d against the all-ones convolution and the convolution with the whole kernel, both written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal.layers import ICConv2d
from timm_spinal.layers.ic_conv import collide

GEOMETRIES = (
    dict(in_channels=8, out_channels=12, kernel_size=3, padding=1, bias=False),
    dict(in_channels=8, out_channels=12, kernel_size=3, padding=1, stride=2),
    dict(in_channels=8, out_channels=12, kernel_size=3, padding=2, dilation=2, groups=4),
    dict(in_channels=8, out_channels=8, kernel_size=3, padding=1, groups=8, bias=False),
    dict(in_channels=8, out_channels=12, kernel_size=1),
    dict(in_channels=8, out_channels=12, kernel_size=1, stride=2, groups=2, bias=False),
    dict(in_channels=6, out_channels=4, kernel_size=(7, 2), padding=(3, 1), stride=(2, 1)),
    dict(in_channels=6, out_channels=4, kernel_size=3, padding=2),
    dict(in_channels=6, out_channels=4, kernel_size=4, padding='same', groups=2),
    dict(in_channels=6, out_channels=4, kernel_size=3, padding='valid'),
    dict(in_channels=6, out_channels=4, kernel_size=3, padding=1, padding_mode='reflect', stride=2),
)
# what it adds to a state dict of nn.Conv2d, by options; see tests/models/test_contract.py
KEYS = {'ic': [
    (dict(), ['ic_weight']),
    (dict(ic_norm='bias'), ['ic_weight', 'ic_bias']),
    (dict(ic_norm='bn'), ['ic_weight', 'ic_bn.weight', 'ic_bn.bias', 'ic_bn.running_mean', 'ic_bn.running_var',
                          'ic_bn.num_batches_tracked']),
]}
OPTIONS = [
    dict(ic_mode=mode, ic_scale=scale, ic_norm=norm)
    for mode in ('filter', 'layer', 'pair') for scale in ('mean', 'raw') for norm in ('', 'bias', 'bn')
]


def ids(options):
    return '-'.join(str(value) for value in options.values())


def make(seed: int = 0, **kwargs) -> ICConv2d:
    """A layer with random parameters of the collision, in float64."""
    torch.manual_seed(seed)
    layer = ICConv2d(**kwargs, dtype=torch.float64)
    for name, p in layer.named_parameters():
        if name.startswith('ic_'):
            scale = 0.1 if kwargs.get('ic_scale') == 'raw' and name == 'ic_weight' else 1.
            nn.init.normal_(p, std=scale)
    return layer


def image(layer: ICConv2d, batch: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(batch, layer.in_channels, 9, 10, dtype=torch.float64, generator=g)


def dense_w(layer: ICConv2d, scale: str) -> torch.Tensor:
    """w' as a kernel of the size of ``weight``."""
    w = layer.ic_weight.view(layer.ic_weight.shape[0], -1, 1, 1).expand_as(layer.weight)
    return w if scale == 'raw' else w / layer.weight[0].numel()


def plain_conv(layer: ICConv2d, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    names = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')
    conv = nn.Conv2d(**{name: getattr(layer, name) for name in names}, bias=False, dtype=x.dtype)
    del conv.weight
    conv.weight = weight
    return conv(x)


@pytest.mark.filterwarnings('ignore:.*even kernel')
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=ids)
def test_local_mean_is_the_all_ones_convolution(geometry):
    layer = make(**geometry)
    x = image(layer)
    box = plain_conv(layer, x, torch.ones_like(layer.weight)) / layer.weight[0].numel()
    _, s, _ = layer.parts(x)
    assert s.shape[1] == layer.groups
    torch.testing.assert_close(s.repeat_interleave(layer.out_channels // layer.groups, 1), box)


@pytest.mark.parametrize('options', OPTIONS, ids=ids)
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=ids)
def test_output_is_that_of_the_fused_kernel(geometry, options):
    """z + N(conv(x; W - w')) + b2, the second convolution with the whole kernel."""
    layer = make(**geometry, **options)
    x = image(layer)
    z, u = (plain_conv(layer, x, w) for w in (layer.weight, layer.weight - dense_w(layer, options['ic_scale'])))
    if layer.ic_bias is not None:
        u = u + layer.ic_bias.view(-1, 1, 1)
    if layer.ic_bn is not None:
        u = F.batch_norm(u, None, None, layer.ic_bn.weight, layer.ic_bn.bias, training=True)
    expected = z + u.clamp(min=0)
    if layer.bias is not None:
        expected = expected + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('groups', [1, 4])
def test_w_above_all_weights_is_exactly_the_plain_convolution(groups):
    layer = make(in_channels=8, out_channels=12, kernel_size=3, padding=1, groups=groups, ic_scale='raw')
    nn.init.constant_(layer.ic_weight, layer.weight.max().item() + 1e-6)
    x = image(layer)
    plain = F.conv2d(x, layer.weight, None, 1, 1, 1, groups) + layer.bias.view(-1, 1, 1)
    assert torch.equal(layer(x), plain)
    layer(x).sum().backward()
    assert not layer.ic_weight.grad.any()  # the dead branch of docs/papers/ic_networks.md, section 3


def test_zero_w_before_a_relu_is_twice_the_relu():
    layer = make(in_channels=8, out_channels=12, kernel_size=3, padding=1, bias=False, ic_init=0.)
    layer.reset_added_parameters()
    x = image(layer) - 0.5
    z = F.conv2d(x, layer.weight, None, 1, 1)
    torch.testing.assert_close(F.relu(layer(x)), 2 * F.relu(z))
    assert (z < 0).any() and (z > 0).any()


@pytest.mark.parametrize('mode, count', [('filter', 12), ('layer', 1), ('pair', 12 * 2)])
@pytest.mark.parametrize('norm, more', [('', 0), ('bias', 12), ('bn', 24)])
def test_parameters_and_state_dict(mode, count, norm, more):
    geometry = dict(in_channels=8, out_channels=12, kernel_size=3, groups=4)
    plain = nn.Conv2d(**geometry)
    layer = ICConv2d(**geometry, ic_mode=mode, ic_norm=norm)
    extra = {name: p.numel() for name, p in layer.named_parameters() if name not in dict(plain.named_parameters())}
    assert sum(extra.values()) == count + more and all(name.startswith('ic_') for name in extra)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and missing and all(name.startswith('ic_') for name in missing)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize('mode', ['filter', 'layer', 'pair'])
def test_both_scales_start_as_the_same_function(mode):
    geometry = dict(in_channels=8, out_channels=12, kernel_size=3, padding=1, ic_mode=mode, ic_init=1.5)
    torch.manual_seed(0)
    mean, raw = (ICConv2d(**geometry, ic_scale=scale, dtype=torch.float64) for scale in ('mean', 'raw'))
    raw.weight, raw.bias = mean.weight, mean.bias
    assert (mean.ic_weight == 1.5).all() and torch.allclose(raw.ic_weight, torch.tensor(1.5 / 72).double())
    x = image(mean)
    z, s, w = mean.parts(x)
    torch.testing.assert_close(mean.pre_sigma(z, s, w), z - 1.5 * F.avg_pool2d(x.mean(1, True), 3, 1, 1))
    torch.testing.assert_close(raw(x), mean(x))


def expression(z, s, w, groups, b1=None, b2=None):
    """y = z + ReLU(z - w s + b1) + b2."""
    u = z - s.repeat_interleave(len(w) // groups, 1) * w.view(-1, 1, 1)
    u = u if b1 is None else u + b1.view(-1, 1, 1)
    y = z + torch.relu(u)
    return y if b2 is None else y + b2.view(-1, 1, 1)


@pytest.mark.parametrize('biases', [(), ('b1',), ('b2',), ('b1', 'b2')], ids=''.join)
@pytest.mark.parametrize('groups', [1, 2])
def test_gradients_of_the_form_that_keeps_a_mask(groups, biases):
    torch.manual_seed(0)
    shapes = ((2, 4, 2, 3), (2, groups, 2, 3), *[(4,)] * (1 + len(biases)))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(z, s, w, *rest):
        return collide(z, s, w, groups, **dict(zip(biases, rest)))

    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
    expected = expression(*given[:3], groups, **dict(zip(biases, given[3:])))
    torch.testing.assert_close(run(*given), expected)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), expected)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_keep_the_memory_format(memory_format):
    """Of maps of the size that a network has."""
    shape, g = (7, 16, 80, 80), torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=g).to(memory_format=memory_format).requires_grad_()
    s = torch.rand(shape[0], 2, *shape[2:], generator=g).requires_grad_()
    w, b1, b2 = given = [torch.randn(shape[1], generator=g).requires_grad_() for _ in range(3)]
    expected, y = expression(z, s, w, 2, b1, b2), collide(z, s, w, 2, b1, b2)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(collide(z, s, w, 2, b1, b2), expected)
    grad, given = torch.randn(shape, generator=g).to(memory_format=memory_format), (z, s, *given)
    found = torch.autograd.grad(y, given, grad)
    assert y.is_contiguous(memory_format=memory_format) and found[0].is_contiguous(memory_format=memory_format)
    for one, two in zip(found, torch.autograd.grad(expected, given, grad)):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)  # sums of 10^4 terms


def test_gradients_of_each_image_by_vmap():
    layer = make(in_channels=8, out_channels=12, kernel_size=3, groups=4, ic_norm='bias')
    x, parameters = image(layer), dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, p in parameters.items():
        expected = torch.stack([torch.autograd.grad(loss(parameters, one), p)[0] for one in x])
        torch.testing.assert_close(found[name], expected)


def test_an_empty_batch_gives_an_empty_map():
    layer = make(in_channels=8, out_channels=12, kernel_size=3)
    assert layer(image(layer)[:0]).shape == (0, 12, 7, 8)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('options', [dict(), dict(ic_mode='pair'), dict(ic_norm='bn', ic_scale='raw')], ids=ids)
@pytest.mark.parametrize('geometry', GEOMETRIES[1:3], ids=ids)
def test_scripted_traced_and_compiled(geometry, options):
    layer = make(**geometry, **options).eval()
    x = image(layer)
    expected = layer(x)
    traced = torch.fx.symbolic_trace(layer)
    torch._dynamo.reset()
    for other in (
            torch.jit.script(layer), torch.jit.trace(layer, x), traced, torch.jit.script(traced), copy.deepcopy(layer),
            torch.compile(layer, fullgraph=True, backend='eager'), torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize('groups', [1, 4])
def test_bfloat16_autocast_and_channels_last(groups):
    layer = make(in_channels=8, out_channels=12, kernel_size=3, padding=1, groups=groups).float()
    x = image(layer).float()
    expected = layer(x)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert layer.ic_weight.grad.dtype == torch.float32 and torch.isfinite(layer.ic_weight.grad).all()
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_meta_device():
    layer = ICConv2d(8, 12, 3, ic_norm='bn', device='meta')
    assert all(t.device.type == 'meta' for t in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.empty(2, 8, 9, 9, device='meta')).shape == (2, 12, 7, 7)


@pytest.mark.parametrize('options, message', [
    (dict(ic_mode='fiter'), "ic_mode 'fiter' is unknown; it is one of 'filter', 'layer', 'pair'"),
    (dict(ic_scale='sum'), "ic_scale 'sum' is unknown"),
    (dict(ic_norm='none'), "ic_norm 'none' is unknown; it is one of '', 'bias', 'bn'"),
    (dict(ic_init='1'), "ic_init '1' is not a finite number"),
    (dict(ic_init=float('nan')), 'ic_init nan is not a finite number'),
])
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        ICConv2d(8, 12, 3, **options)


def collision(dtype, n=4, filters=6, side=40):
    """z, s, w, b1 of a collision whose weights are float32 and whose maps are of a type."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, filters, side, side, generator=generator).to(dtype).requires_grad_()
    s = torch.randn(n, 1, side, side, generator=generator).to(dtype).requires_grad_()
    w, b1 = (torch.randn(filters, generator=generator).requires_grad_() for _ in range(2))
    return z, s, w, b1


def gradients(function, inputs, upstream):
    z, s, w, b1 = inputs
    return torch.autograd.grad(function(z, s, w, 1, b1), inputs, upstream)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sums_of_gradients_are_float32(dtype, compiled):
    """Those of w and b1 are sums over 6,400 places, which in half precision would be rounded, or above 65,504."""
    inputs = collision(dtype)
    upstream = 50 * torch.ones_like(inputs[0])
    function = torch.compile(collide, backend='aot_eager') if compiled else collide
    found = gradients(function, inputs, upstream)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    # the same places are active, so that only the sums differ; the compiled expression is float32 inside
    inner = torch.float32 if compiled else dtype
    z, s, w, b1 = (t.detach().to(inner) for t in inputs)
    du = (torch.addcmul(z, s, w[:, None, None], value=-1) + b1[:, None, None] > 0).double() * 50
    assert found[2].dtype == found[3].dtype == torch.float32 and found[0].dtype == dtype
    dw, db = -(du * wide[1]).sum((0, 2, 3)), du.sum((0, 2, 3))
    assert db.max() > 65_504 and found[3].isfinite().all()
    torch.testing.assert_close(found[3].double(), db, rtol=0.01 if compiled else 1e-6, atol=0.)
    torch.testing.assert_close(found[2].double(), dw, rtol=0.01, atol=0.01 * dw.abs().max().item())
