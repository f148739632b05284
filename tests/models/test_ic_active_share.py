import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spinal  # noqa: F401
from timm_spinal import convert_to_ic, ic_active_share
from timm_spinal.layers import ICConv2d
from timm_spinal.models.ic_variants import BACKBONES


def images(n=4, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', [f'ic{backbone}' for backbone in BACKBONES])
def test_every_layer_is_alive_at_initialisation(name):
    """And every w' gets a gradient (spec acceptance 5); with the last gains of blocks not at 0."""
    torch.manual_seed(0)
    options = {} if name.endswith('_cifar') else dict(zero_init_last=False)
    model = timm.create_model(name, num_classes=5, **options)
    shares = ic_active_share(model, images())
    convs = [key for key, module in model.named_modules() if isinstance(module, ICConv2d)]
    assert list(shares) == convs and all(0.01 < share < 0.9 for share in shares.values())
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 3])).backward()
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
    shares = ic_active_share(convert_to_ic(timm.create_model('resnet18'), **options), images())
    assert all(low < share < high for share in shares.values())


def test_the_trap_that_it_is_for():
    """w' = 1 raw on inputs behind a ReLU (spec 2.5): nothing collides."""
    torch.manual_seed(0)
    model = timm.create_model('icresnet18', ic_scale='raw', ic_init=1.)
    for module in model.modules():
        if isinstance(module, ICConv2d):
            torch.nn.init.ones_(module.ic_weight)
    assert set(ic_active_share(model, images()).values()) == {0.}


def test_value_over_batches_and_no_trace_left():
    torch.manual_seed(0)
    model = convert_to_ic(timm.create_model('test_resnet'), 'all').train()
    conv = model.conv1[0] if isinstance(model.conv1, torch.nn.Sequential) else model.conv1
    x, buffers = images(), {name: b.clone() for name, b in model.named_buffers()}
    shares = ic_active_share(model, [(x[:1], 0), (x[1:], 0)])
    name = next(name for name, module in model.named_modules() if module is conv)
    z = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    t = F.avg_pool2d(x.mean(1, True), conv.kernel_size, conv.stride, conv.padding)
    assert shares[name] == pytest.approx((z > t).float().mean().item(), abs=1e-4)
    assert model.training and all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    assert all(not module._forward_hooks for module in model.modules())


def test_what_has_no_collision_or_no_image():
    with pytest.raises(ValueError, match='ResNet has no IC convolution'):
        ic_active_share(timm.create_model('test_resnet'), images())
    with pytest.raises(ValueError, match='The loader gives no batch'):
        ic_active_share(timm.create_model('icresnet20_cifar'), [])
