"""Plain weights in a converted model, with collisions chosen from the weights alone."""

import pytest
import torch

from timm_spinal import ic_active_share
from timm_spinal.layers import ICConv2d
from timm_spinal.models.ic_quiet_start import ic_quiet_start

from .test_ic_warm_start import agreement, convert, digits, teacher  # noqa: F401, fixtures


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


def test_nearly_the_teacher_without_an_image(teacher, digits):  # noqa: F811
    """Beside v = 1, which tests/models/test_ic_warm_start.py finds below 0.6."""
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
