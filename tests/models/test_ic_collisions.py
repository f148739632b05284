"""Shares of active collisions, and starts of a converted model from plain weights, without and with images."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal import convert_to_ic, ic_active_share, ic_warm_start, recalibrate_bn
from timm_spinal.layers import ICConv2d
from timm_spinal.models.convolutions import CONVOLUTIONS
from timm_spinal.models.ic_collisions import ic_convs, ic_quiet_start


def noise(n=4, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', [f'ic{backbone}' for backbone in CONVOLUTIONS['ic'].backbones])
def test_every_layer_is_alive_at_initialisation(name):
    """And every w' gets a gradient (docs/papers/ic_networks.md, section 3); with the last gains of blocks not at 0."""
    torch.manual_seed(0)
    options = {} if name.endswith('_cifar') else dict(zero_init_last=False)
    model = timm.create_model(name, num_classes=5, **options)
    shares = ic_active_share(model, noise())
    convs = [key for key, module in model.named_modules() if isinstance(module, ICConv2d)]
    assert list(shares) == convs and all(0.01 < share < 0.9 for share in shares.values())
    F.cross_entropy(model(noise()), torch.tensor([0, 1, 2, 3])).backward()
    dead = [key for key in convs if not model.get_submodule(key).ic_weight.grad.abs().max() > 0]
    assert dead == []


@pytest.mark.parametrize('options, low, high', [
    (dict(init=0.), 0.3, 0.7),
    (dict(norm='bn', scale='raw', init=576.), 0.1, 0.9),
    (dict(scope='all'), 0.05, 0.95),
    (dict(mode='pair'), 0.05, 0.95),
])
def test_other_choices(options, low, high):
    torch.manual_seed(0)
    shares = ic_active_share(convert_to_ic(timm.create_model('resnet18'), **options), noise())
    assert all(low < share < high for share in shares.values())


def test_the_trap_that_it_is_for():
    """w' = 1 raw on inputs behind a ReLU (docs/papers/ic_networks.md, section 3): nothing collides."""
    torch.manual_seed(0)
    model = timm.create_model('icresnet18', ic_scale='raw', ic_init=1.)
    for module in model.modules():
        if isinstance(module, ICConv2d):
            torch.nn.init.ones_(module.ic_weight)
    assert set(ic_active_share(model, noise()).values()) == {0.}


def test_value_over_batches_and_no_trace_left():
    torch.manual_seed(0)
    model = convert_to_ic(timm.create_model('test_resnet'), 'all').train()
    conv = model.conv1[0] if isinstance(model.conv1, torch.nn.Sequential) else model.conv1
    x, buffers = noise(), {name: b.clone() for name, b in model.named_buffers()}
    shares = ic_active_share(model, [(x[:1], 0), (x[1:], 0)])
    name = next(name for name, module in model.named_modules() if module is conv)
    z = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    t = F.avg_pool2d(x.mean(1, True), conv.kernel_size, conv.stride, conv.padding)
    assert shares[name] == pytest.approx((z > t).float().mean().item(), abs=1e-4)
    assert model.training and all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    assert all(not module._forward_hooks for module in model.modules())


def test_what_has_no_collision_or_no_image():
    with pytest.raises(ValueError, match='ResNet has no IC convolution'):
        ic_active_share(timm.create_model('test_resnet'), noise())
    with pytest.raises(ValueError, match='The loader gives no batch'):
        ic_active_share(timm.create_model('icresnet20_cifar'), [])


@pytest.fixture(scope='module')
def digits():
    """scikit-learn's handwritten digits, 16 px: 1,400 for training, 397 others."""
    from sklearn.datasets import load_digits
    found = load_digits()
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=2.)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[order], torch.tensor(found.target)[order]
    return images[:1400], classes[:1400], images[1400:], classes[1400:]


@pytest.fixture(scope='module')
def teacher(digits):
    """resnet20_cifar after three epochs or so."""
    images, classes, test_images, test_classes = digits
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', in_chans=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(70):
        chosen = torch.randint(len(images), (64,))
        optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / 70)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), classes[chosen]).backward()
        optimizer.step()
    assert (predict(model, test_images) == test_classes).float().mean() > 0.9
    return model


@torch.no_grad()
def predict(model, images):
    return model.eval()(images).argmax(1)


def agreement(model, teacher, digits):
    """Part of the test images that both give the same class."""
    return (predict(model, digits[2]) == predict(teacher, digits[2])).float().mean().item()


def convert(teacher, **options):
    return convert_to_ic(copy.deepcopy(teacher), **options)


def batches(digits):
    return [(images, 0) for images in digits[0].split(100)]


@pytest.mark.slow
def test_nearly_the_teacher_at_step_0(teacher, digits):
    """As loaded, with statistics anew, and by the quantile rule (the rows of docs/papers/ic_networks.md, section 7)."""
    loaded = convert(teacher)
    as_loaded = agreement(loaded, teacher, digits)
    recalibrated = agreement(recalibrate_bn(loaded, batches(digits)), teacher, digits)
    warm = convert(teacher)
    shares = ic_warm_start(warm, batches(digits))
    started = agreement(warm, teacher, digits)
    print(f'as loaded {as_loaded:.3f}, statistics anew {recalibrated:.3f}, warm start {started:.3f}')
    assert as_loaded < 0.6 and recalibrated > 0.85 and started > 0.9
    assert list(shares) == list(ic_convs(warm)) and all(0.005 < share < 0.06 for share in shares.values())
    F.cross_entropy(warm.train()(digits[0][:64]), digits[1][:64]).backward()
    assert all(conv.ic_weight.grad.abs().max() > 0 for conv in ic_convs(warm).values())


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(scale='raw'), dict(norm='bias', mode='layer'), dict(mode='pair'), dict(mode='pair', scale='raw')])
@pytest.mark.parametrize('active', [0.02, 0.2])
def test_active_share_is_what_was_asked_for(teacher, digits, options, active):
    """In the first collision it is exact but for sampling: its input is the teacher's."""
    model = convert(teacher, **options)
    weights = {name: p.clone() for name, p in model.named_parameters() if 'ic_weight' not in name}
    shares = ic_warm_start(model, batches(digits), active, count=4)
    assert next(iter(shares.values())) == pytest.approx(active, rel=0.2)
    assert all(0. < share < 3 * active for share in shares.values())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert all(not module._forward_hooks for module in model.modules())


def test_groups_are_taken_apart():
    """A grouped convolution whose second group sees inputs ten times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(ICConv2d(4, 6, 3, padding=1, groups=2, bias=True), nn.BatchNorm2d(6)).train()
    x = torch.rand(8, 4, 20, 20) * torch.tensor([1., 1., 10., 10.]).view(-1, 1, 1)
    ic_warm_start(model, x, 0.1)
    conv = model[0]
    u = conv.pre_sigma(*conv.parts(x))
    torch.testing.assert_close((u > 0).float().mean((0, 2, 3)), torch.full((6,), 0.1), atol=0.01, rtol=0.)
    assert model.training
    torch.testing.assert_close(model[1].running_mean, conv(x).mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-4)


def test_filters_without_input_keep_their_w():
    model = nn.Sequential(ICConv2d(4, 6, 3, groups=2))
    x = torch.rand(4, 4, 20, 20)
    x[:, :2] = 0.
    ic_warm_start(model, x)
    w = model[0].ic_weight
    assert (w[:3] == 1.).all() and w.isfinite().all() and (w[3:] != 1.).all()


def test_what_cannot_be_started(teacher, digits):
    for active in (0., 1., float('nan')):
        with pytest.raises(ValueError, match=r'is not in \(0, 1\)'):
            ic_warm_start(convert(teacher), batches(digits), active)
    with pytest.raises(ValueError, match="'stages.1.0.conv1' has BatchNorm inside sigma"):
        ic_warm_start(convert(teacher, norm='bn'), batches(digits))
    with pytest.raises(ValueError, match='SmallResNet has no IC convolution'):
        ic_warm_start(teacher, batches(digits))
    model = convert(teacher)
    with pytest.raises(ValueError, match='The loader gives no batch'):
        ic_warm_start(model, [])
    assert all((conv.ic_weight == 1.).all() for conv in ic_convs(model).values())
    assert min(ic_active_share(model, digits[0][:10]).values()) > 0.


@pytest.mark.parametrize('options', [
    dict(), dict(ic_scale='raw'), dict(ic_mode='pair'), dict(ic_mode='pair', ic_scale='raw'), dict(groups=2)])
@pytest.mark.parametrize('active', [0.02, 0.1])
def test_share_on_inputs_as_it_supposes_them(options, active):
    torch.manual_seed(0)
    conv = ICConv2d(64, 32, 1, bias=False, **options)
    model, x = torch.nn.Sequential(conv), torch.randn(8, 64, 32, 32).relu()
    weight = conv.weight.clone()
    ic_quiet_start(model, active)
    assert 0.4 * active < ic_active_share(model, x)['0'] < 1.2 * active  # u is not quite normal
    assert torch.equal(conv.weight, weight)


def test_a_layer_takes_its_loudest_filter():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(ICConv2d(64, 32, 1, ic_mode='layer')), torch.randn(8, 64, 32, 32).relu()
    ic_quiet_start(model, 0.1)
    assert 0. < ic_active_share(model, x)['0'] < 0.1


def test_nearly_the_teacher_without_an_image(teacher, digits):
    """Beside v = 1, which another test finds below 0.6."""
    model = convert(teacher)
    ic_quiet_start(model)
    assert agreement(model, teacher, digits) > 0.75
    shares = ic_active_share(model, digits[2])
    assert all(0. < share < 0.25 for share in shares.values())


def test_batchnorm_inside_stays():
    conv = ICConv2d(8, 8, 3, ic_norm='bn')
    ic_quiet_start(torch.nn.Sequential(conv))
    assert (conv.ic_weight == 1.).all()


@pytest.mark.parametrize('active', [0., 0.5, -1.])
def test_share_out_of_range(active):
    with pytest.raises(ValueError, match='is not in'):
        ic_quiet_start(torch.nn.Sequential(ICConv2d(8, 8, 3)), active)
