import pytest
import torch
from torch import nn

from timm_spinal.bench.heads import count_macs, count_params, main, measure_head
from timm_spinal.errors import UserError


def test_macs_of_one_linear_and_one_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    assert count_macs(model, torch.zeros(1, 3, 8, 8)) == 8 * 8 * 4 * 3 * 9 + 4 * 8 * 8 * 5


def test_head_cost_counts_what_the_head_adds():
    cost = measure_head('resnet18_pspinal', batch_size=1, image_size=32, rounds=1)
    features, layers, width, classes = 512, 4, 200, 1000
    head = layers * width * (features + 1) + width ** 2 * layers * (layers - 1) // 2
    head += (features + layers * width) * classes + classes
    linear = features * classes + classes
    assert cost.backbone == 'resnet18'
    assert cost.params[0] - cost.params[1] == head - linear
    biases = layers * width  # the last linear's bias is in both
    assert cost.macs[0] - cost.macs[1] == head - linear - biases
    assert cost.ratio.median > 0 and min(cost.milliseconds) > 0


def test_count_params_counts_a_tied_parameter_once():
    linear = nn.Linear(3, 3, bias=False)
    assert count_params(nn.Sequential(linear, linear)) == 9


def test_main_prints_ratio_params_and_macs(capsys):
    assert main(['resnet10t_mlp', '-b', '1', '--img-size', '32', '--rounds', '1']) == 0
    out = capsys.readouterr().out
    assert 'resnet10t_mlp / resnet10t: time ratio' in out and '1 rounds' in out
    assert 'M params' in out and 'GMACs' in out


@pytest.mark.parametrize('argv, message', [
    (['resnet18'], 'no <timm backbone>_<head>'),
    (['nosuchnet_spinal'], 'nosuchnet_spinal'),
    (['resnet10t_mlp', '--rounds', '0'], '--rounds: must be at least 1'),
])
def test_bad_input_is_a_user_error(argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
