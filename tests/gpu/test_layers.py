"""What has code of its own on the device: routing, IC convolutions, shared bases, detectors."""
import copy

import pytest
import timm
import torch

import timm_spinal
from timm_spinal.detection import create_detector
from timm_spinal.layers import CapsuleRouting, ICConv2d
from timm_spinal.layers.packed_routing import pack_routing

from .conftest import AMP_DTYPES, difference


@pytest.mark.parametrize('memory', ['whole', 'lean'])
@pytest.mark.parametrize('projector, agreement', [(False, False), (True, False), (False, True)])
def test_routing(projector, agreement, memory, device):
    torch.manual_seed(0)
    options = dict(xnor_projector=projector, xnor_agreement=agreement)
    reference = CapsuleRouting(32, 8, 20, **options)
    routing = CapsuleRouting(32, 8, 20, memory=memory, **options).to(device)
    routing.load_state_dict(reference.state_dict())
    x = torch.randn(4, 32, 8).relu()
    y, z = reference(x), routing(x.to(device))
    y.square().sum().backward()
    z.square().sum().backward()
    assert difference(z, y) < 1e-3
    assert difference(routing.weight.grad, reference.weight.grad) < 1e-3


@pytest.mark.parametrize('batch', [4, 64])
@pytest.mark.parametrize('projector', [True, False])
def test_packed_routing(projector, batch, device):
    torch.manual_seed(0)
    routing = CapsuleRouting(32, 8, 20, xnor_projector=projector, xnor_agreement=not projector)
    x = torch.randn(batch, 32, 8).relu()
    with torch.no_grad():
        assert difference(copy.deepcopy(pack_routing(routing)).to(device)(x.to(device)), routing(x)) < 1e-3


@pytest.mark.parametrize('groups, norm, memory_format', [
    (1, '', torch.channels_last), (4, 'bias', torch.contiguous_format), (1, 'bn', torch.channels_last)])
def test_ic_convolution(groups, norm, memory_format, device):
    torch.manual_seed(0)
    reference = ICConv2d(16, 32, 3, padding=1, groups=groups, ic_norm=norm)
    conv = copy.deepcopy(reference).to(device)
    x, weight = torch.randn(4, 16, 12, 12).relu(), torch.randn(4, 32, 12, 12)
    u = x.clone().requires_grad_()
    v = x.to(device).contiguous(memory_format=memory_format).requires_grad_()
    (reference(u) * weight).sum().backward()
    (conv(v) * weight.to(device)).sum().backward()
    assert difference(v.grad, u.grad) < 1e-3
    for (name, p), q in zip(reference.named_parameters(), conv.parameters()):
        if p.grad.abs().max() > 1e-4:
            assert difference(q.grad, p.grad) < 1e-3, name


@pytest.mark.parametrize('name', ['resnet32_sb_s16u1_cifar', 'resnet34_sb_s48u1d'])
def test_shared_bases(name, device):
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    x = torch.randn(4, *model.pretrained_cfg['input_size'], device=device)
    timm_spinal.recalibrate_bn(model, x)
    model.eval()
    merged, folded = timm_spinal.merge_bases(model), timm_spinal.fold_bases(model)
    with torch.no_grad():
        y = model(x)
        assert difference(merged(x), y) < 1e-3 and difference(folded(x), y) < 1e-3
        for dtype in AMP_DTYPES:
            with torch.autocast(device.type, dtype):
                assert difference(model(x), y) < 3 * difference(merged(x), y) + 0.02, dtype
    penalty = model.orthogonality_loss('stage')
    assert penalty.device.type == device.type and penalty > 0
    assert difference(penalty, copy.deepcopy(model).cpu().orthogonality_loss('stage')) < 1e-3


def test_ic_warm_start(device):
    torch.manual_seed(0)
    model = timm.create_model('icresnet20_cifar').to(device)
    shares = timm_spinal.ic_warm_start(model, torch.randn(16, 3, 32, 32).relu(), 0.02)
    assert len(shares) == 18 and all(0. <= share < 0.3 for share in shares.values())


@pytest.mark.parametrize('kind', ['fasterrcnn', 'retinanet'])
def test_step_of_a_detector_in_bfloat16(kind, device):
    torch.manual_seed(0)
    detector = create_detector(kind, backbone='resnet18', num_classes=5).to(device).train()
    target = dict(boxes=torch.tensor([[4., 4., 60., 60.]]).to(device), labels=torch.tensor([1]).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        losses = detector([torch.rand(3, 96, 96, device=device)] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert len(losses) >= 2 and all(bool(loss.isfinite()) for loss in losses.values())
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
