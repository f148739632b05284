"""Warm start of a converted model, from a net that was really trained."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal import convert_to_ic, ic_active_share, ic_warm_start, recalibrate_bn
from timm_spinal.layers import ICConv2d
from timm_spinal.models.ic_active_share import ic_convs


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


def test_nearly_the_teacher_at_step_0(teacher, digits):
    """As loaded, with statistics anew, and by the quantile rule (the rows of spec 4.4)."""
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
