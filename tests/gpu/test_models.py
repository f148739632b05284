"""Every registered model on the device: forward and backward as on the CPU, and in half precision."""
import copy

import pytest
import timm
import torch

import timm_spinal

from .conftest import AMP_DTYPES, difference


def outputs_and_gradients(model, x):
    y = model(x)
    y.square().mean().backward()
    return y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('name', timm_spinal.list_models())
def test_model_is_that_of_the_cpu(name, device):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        if model(x).abs().max() > 1e3:  # as deep nets give before their first update, and more than float16 holds
            timm_spinal.recalibrate_bn(model, torch.randn(8, *x.shape[1:]))
            model.eval()
    moved = copy.deepcopy(model).to(device)
    y, gradients = outputs_and_gradients(model, x)
    z, found = outputs_and_gradients(moved, x.to(device))
    # rounding may flip the sign of a sum near zero: binary heads have a larger tolerance
    binary = any(getattr(m, 'xnor_projector', False) or getattr(m, 'xnor_agreement', False) for m in model.modules())

    assert found.keys() == gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert z.device.type == device.type and difference(z, y) < (0.05 if binary else 2e-3)
    for key, gradient in gradients.items():
        if gradient.abs().max() > 1e-7:
            assert difference(found[key], gradient) < (0.5 if binary else 0.03), key

    for dtype in AMP_DTYPES:
        # float16 with channels last, as it is trained
        form = torch.channels_last if dtype == torch.float16 else torch.contiguous_format
        moved.to(memory_format=form).eval()
        image = x.to(device).to(memory_format=form)
        with torch.no_grad(), torch.autocast(device.type, dtype):
            assert difference(moved(image), y) < (1. if binary else 0.15), dtype
        moved.train().zero_grad()
        state = copy.deepcopy(moved.state_dict())
        with torch.autocast(device.type, dtype):
            out = moved(image)
        (out.float().square().mean() * 8).backward()
        gradients = [p.grad for p in moved.parameters() if p.grad is not None]
        assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients), dtype
        moved.load_state_dict(state)  # running statistics too
