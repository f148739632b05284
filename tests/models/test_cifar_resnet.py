import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spinal  # noqa: F401
from timm_spinal.cost import count_macs
from timm_spinal.models.cifar_resnet import PadShortcut

# docs/papers/shared_bases.md, section 6; 20 layers by 9 (3 16 + 16 16 6 + 16 32 + 32 32 5 + 32 64 + 64 64 5) + 2 688 +
# 650
COUNTS = {'resnet20_cifar': 269_722, 'resnet32_cifar': 464_154, 'resnet56_cifar': 853_018}


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_counts(name):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == COUNTS[name]


def test_macs():
    """68.9 M in docs/papers/shared_bases.md, section 6."""
    macs = count_macs(timm.create_model('resnet32_cifar', device='meta'), torch.empty(1, 3, 32, 32, device='meta'))
    assert macs == 9 * 1024 * (3 * 16 + 16 * 16 * 10) + 9 * 256 * (16 * 32 + 32 * 32 * 9) \
        + 9 * 64 * (32 * 64 + 64 * 64 * 9) + 640 == 68_862_592


def test_shortcut_takes_every_other_position_and_pads_channels_on_both_sides():
    x = torch.arange(32.).view(1, 2, 4, 4)
    y = PadShortcut(2, 5)(x)
    assert y.shape == (1, 5, 2, 2)
    assert y[0, 1].tolist() == [[0, 2], [8, 10]] and y[0, 2].tolist() == [[16, 18], [24, 26]]
    assert not y[0, [0, 3, 4]].any()


def conv_bn(state, x, conv, bn, stride=1):
    x = F.conv2d(x, state[f'{conv}.weight'], stride=stride, padding=1)
    return F.batch_norm(x, *(state[f'{bn}.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')))


def test_logits_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar').eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.)
    state = model.state_dict()
    images = torch.randn(2, 3, 32, 32)
    x = F.relu(conv_bn(state, images, 'stages.0.conv', 'stages.0.bn'))
    for stage, chs in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            prefix, stride = f'stages.{stage}.{block}', 2 if stage > 1 and block == 0 else 1
            y = F.relu(conv_bn(state, x, f'{prefix}.conv1', f'{prefix}.bn1', stride))
            y = conv_bn(state, y, f'{prefix}.conv2', f'{prefix}.bn2')
            if stride == 2:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, chs // 4, chs // 4))
            x = F.relu(y + x)
    assert x.shape == (2, 64, 8, 8)
    logits = F.linear(x.mean((2, 3)), state['head.fc.weight'], state['head.fc.bias'])
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


def test_feature_levels_and_state_dict_keys():
    model = timm.create_model('resnet20_cifar', features_only=True).eval()
    assert [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 32, 32))] == [
        (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    keys = list(timm.create_model('resnet56_cifar', device='meta').state_dict())
    assert len(keys) == 6 * 55 + 2 and keys[-2:] == ['head.fc.weight', 'head.fc.bias']
    assert {'stages.0.conv.weight', 'stages.3.8.conv2.weight', 'stages.3.8.bn2.running_var'} <= set(keys)
