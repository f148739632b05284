import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spinal.models.spinal_vgg5  # noqa: F401


def num_params(model):
    return sum(p.numel() for p in model.parameters())


# docs/papers/spinalnet.md, section 4, small models.
COUNTS = [
    ('vgg5', {}, 3_646_154),
    ('vgg5_spinal', {}, 3_629_770),
    ('vgg5_pspinal', {}, 3_603_914),
    ('vgg5_pspinal', dict(head_preset='qmnist'), 3_604_426),
    ('vgg5', dict(num_classes=62), 3_672_830),
    ('vgg5_spinal', dict(num_classes=62), 3_656_446),
    ('vgg5_pspinal', dict(num_classes=62, head_preset='emnist_letters'), 3_785_982),
    ('vgg5_pspinal', dict(num_classes=62, head_width=128), 3_785_982),
    ('vgg5', dict(num_classes=47), 3_508_416 + 156_719),
    ('vgg5', dict(num_classes=27), 3_508_416 + 146_459),
    ('vgg5_spinal', dict(num_classes=47), 3_508_416 + 140_335),
    ('vgg5_spinal', dict(num_classes=27), 3_508_416 + 130_075),
    ('vgg5_pspinal', dict(num_classes=47), 3_508_416 + 114_479),
    ('vgg5_pspinal', dict(num_classes=27), 3_508_416 + 104_219),
    ('vgg5_pspinal', dict(num_classes=47, head_width=128), 3_508_416 + 266_031),
    ('vgg5_pspinal', dict(num_classes=27, head_width=128), 3_508_416 + 250_651),
]


@pytest.mark.parametrize('name,kwargs,expected', COUNTS)
def test_parameter_counts(name, kwargs, expected):
    assert num_params(timm.create_model(name, device='meta', **kwargs)) == expected


def random_bn_statistics(model):
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)


def batch_norm(state, prefix, x):
    mean, var, weight, bias = (state[f'{prefix}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias'))
    return F.batch_norm(x, mean, var, weight, bias)


def features_by_hand(state, x):
    for stage, convs in enumerate((2, 2, 3, 3)):
        for i in range(convs):
            prefix = f'stages.{stage}.{i}'
            x = F.conv2d(x, state[f'{prefix}.conv.weight'], state[f'{prefix}.conv.bias'], padding=1)
            x = F.relu(batch_norm(state, f'{prefix}.bn', x))
        x = F.max_pool2d(x, 2)
    return x.flatten(1)


def linear(state, prefix, x):
    return F.linear(x, state[f'{prefix}.weight'], state[f'{prefix}.bias'])


def test_spinal_net_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('vgg5_spinal').eval()
    random_bn_statistics(model)
    state, x = model.state_dict(), torch.randn(3, 1, 28, 28)
    f = features_by_hand(state, x)
    assert f.shape == (3, 256)
    h = []
    for i, prefix in enumerate(['first', 'blocks.0', 'blocks.1', 'blocks.2']):
        half = f[:, :128] if i % 2 == 0 else f[:, 128:]
        z = torch.cat([half, h[-1]], 1) if h else half
        z = linear(state, f'head.hidden.{prefix}.fc', z)
        h.append(F.relu(batch_norm(state, f'head.hidden.{prefix}.norm', z)))
    expected = linear(state, 'head.fc', torch.cat(h, 1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_progressive_net_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('vgg5_pspinal').eval()
    random_bn_statistics(model)
    state, x = model.state_dict(), torch.randn(3, 1, 28, 28)
    z = features_by_hand(state, x)
    for prefix in ('first', 'blocks.0', 'blocks.1', 'blocks.2'):
        z = torch.cat([z, F.relu(linear(state, f'head.hidden.{prefix}.fc', z))], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), linear(state, 'head.fc', z), rtol=1e-4, atol=1e-5)


def test_plain_head_is_the_papers():
    head = timm.create_model('vgg5').head
    block = head.hidden[0]
    assert [type(m).__name__ for m in block] == ['Dropout', 'Linear', 'BatchNorm1d', 'ReLU']
    assert block.drop.p == head.drop.p == 0.5
    assert (block.fc.in_features, block.fc.out_features, head.fc.in_features) == (256, 512, 512)


def test_convolution_init_is_fan_out_normal():
    torch.manual_seed(0)
    weight = timm.create_model('vgg5').stages[3][1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


def test_state_dict_keys_are_stable():
    def bn(prefix):
        return [f'{prefix}.{k}' for k in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')]

    expected = []
    for stage, convs in enumerate((2, 2, 3, 3)):
        for i in range(convs):
            expected += [f'stages.{stage}.{i}.conv.weight', f'stages.{stage}.{i}.conv.bias']
            expected += bn(f'stages.{stage}.{i}.bn')
    for block in ('first', 'blocks.0', 'blocks.1', 'blocks.2'):
        expected += [f'head.hidden.{block}.fc.weight', f'head.hidden.{block}.fc.bias', *bn(f'head.hidden.{block}.norm')]
    assert list(timm.create_model('vgg5_spinal', device='meta').state_dict()) == [
        *expected, 'head.fc.weight', 'head.fc.bias']
