import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spinal.models.spinal_cifar  # noqa: F401

# docs/papers/spinalnet.md, section 4, small models.
COUNTS = [
    ('cifarcnn', {}, 5_852_170),
    ('cifarcnn', dict(num_classes=100), 5_898_340),
    ('cifarcnn_spinal', {}, 2_230_282),
    ('cifarcnn_spinal', dict(num_classes=100, head_width=256), 3_524_196),
    ('vgg11_bn_cifar_spinal', {}, 10_559_242),
    ('vgg13_bn_cifar_spinal', {}, 10_744_138),
    ('vgg16_bn_cifar_spinal', {}, 16_056_394),
    ('vgg19_bn_cifar', {}, 38_958_922),
    ('vgg19_bn_cifar', dict(num_classes=100), 39_327_652),
    ('vgg19_bn_cifar_spinal', {}, 21_368_650),
    ('vgg19_bn_cifar_spinal', dict(num_classes=100), 21_553_060),
    ('resnet18_cifar', {}, 3_141_674),
    ('resnet18_cifar_spinal', {}, 3_609_130),
    ('resnet34_cifar', {}, 5_693_700),
    ('resnet34_cifar_spinal', {}, 7_185_668),
]


@pytest.mark.parametrize('name,kwargs,expected', COUNTS)
def test_parameter_counts(name, kwargs, expected):
    assert sum(p.numel() for p in timm.create_model(name, device='meta', **kwargs).parameters()) == expected


def create(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.)
    return model


def linear(state, prefix, x):
    return F.linear(x, state[f'{prefix}.weight'], state[f'{prefix}.bias'])


def conv_bn(state, prefix, x, stride=1):
    x = F.conv2d(x, state[f'{prefix}.conv.weight'], state.get(f'{prefix}.conv.bias'), stride=stride, padding=1)
    mean, var, weight, bias = (state[f'{prefix}.bn.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias'))
    return F.batch_norm(x, mean, var, weight, bias)


def spinal_by_hand(state, splits):
    h = []
    for block, split in zip(('first', 'blocks.0', 'blocks.1', 'blocks.2'), splits):
        z = torch.cat([split, h[-1]], 1) if h else split
        h.append(F.relu(linear(state, f'head.hidden.{block}.fc', z)))
    return linear(state, 'head.fc', torch.cat(h, 1))


def cnn_by_hand(state, x):
    for i in range(3):
        x = F.relu(conv_bn(state, f'stages.{i}.0', x))
        x = F.relu(F.conv2d(x, state[f'stages.{i}.1.weight'], state[f'stages.{i}.1.bias'], padding=1))
        x = F.max_pool2d(x, 2)
    return x.flatten(1)


def resnet18_by_hand(state, x):
    x = F.relu(conv_bn(state, 'stages.0.0', x))
    for i in range(1, 5):
        for j in range(2):
            prefix, stride = f'stages.{i}.{j}', 2 if i > 1 and j == 0 else 1
            y = F.relu(conv_bn(state, f'{prefix}.conv1', x, stride))
            y = conv_bn(state, f'{prefix}.conv2', y)
            x = y + (conv_bn(state, f'{prefix}.downsample', x, stride) if stride == 2 else x)
    return x


def test_cnn_with_spinal_head_by_hand():
    model = create('cifarcnn_spinal')
    state, x = model.state_dict(), torch.randn(3, 3, 32, 32)
    f = cnn_by_hand(state, x)
    assert f.shape == (3, 4096)
    first, second = f[:, :2048], f[:, 2048:]
    with torch.no_grad():
        torch.testing.assert_close(model(x), spinal_by_hand(state, (first, second, first, second)))


def test_cnn_with_plain_head_by_hand():
    model = create('cifarcnn')
    state, x = model.state_dict(), torch.randn(3, 3, 32, 32)
    z = cnn_by_hand(state, x)
    for i in range(2):
        z = F.relu(linear(state, f'head.hidden.{i}.fc', z))
    with torch.no_grad():
        torch.testing.assert_close(model(x), linear(state, 'head.fc', z))
    drops = [(n, m.p) for n, m in model.named_modules() if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d))]
    assert drops == [('stages.1.4', 0.05), ('pool_drop', 0.), ('head.hidden.0.drop', 0.1), ('head.drop', 0.1)]


def test_resnet_with_spatial_split_by_hand():
    model = create('resnet18_cifar_spinal')
    state, x = model.state_dict(), torch.randn(2, 3, 32, 32)
    f = resnet18_by_hand(state, x)
    assert f.shape == (2, 256, 4, 4)
    p = F.max_pool2d(f, 2, 2)
    splits = (p[:, :, 0, 0], p[:, :, 0, 1], p[:, :, 1, 0], p[:, :, 1, 1])
    with torch.no_grad():
        torch.testing.assert_close(model(x), spinal_by_hand(state, splits), rtol=1e-4, atol=1e-4)


def test_resnet_with_linear_head_by_hand():
    model = create('resnet18_cifar')
    state, x = model.state_dict(), torch.randn(2, 3, 32, 32)
    pooled = F.max_pool2d(resnet18_by_hand(state, x), 4).flatten(1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), linear(state, 'head.fc', pooled), rtol=1e-4, atol=1e-4)


def test_resnet_init():
    model = timm.create_model('resnet34_cifar_spinal')
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert model.stages[4][1].conv2.conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert [len(stage) for stage in model.stages[1:]] == [3, 4, 6, 3]


def test_state_dict_keys_are_stable():
    keys = list(timm.create_model('resnet18_cifar', device='meta').state_dict())
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    assert keys[:6] == ['stages.0.0.conv.weight', *(f'stages.0.0.bn.{k}' for k in bn)]
    assert 'stages.2.0.downsample.conv.weight' in keys and 'stages.1.0.downsample.conv.weight' not in keys
    assert len(keys) == 6 * (1 + 16 + 3) + 2
    keys = list(timm.create_model('cifarcnn_spinal', device='meta').state_dict())
    assert len(keys) == 3 * (2 + 5 + 2) + 2 * 5
    assert keys[-4:] == [f'head.{fc}.{k}' for fc in ('hidden.blocks.2.fc', 'fc') for k in ('weight', 'bias')]


@pytest.mark.parametrize('depth', [11, 13, 16, 19])
def test_vgg_is_torchvisions_before_the_head(depth):
    """The same map as torchvision's layers with our weights, and the papers' heads behind it."""
    import torchvision
    model = create(f'vgg{depth}_bn_cifar_spinal')
    theirs = getattr(torchvision.models, f'vgg{depth}_bn')(weights=None).features.eval()
    ours = [value for name, value in model.state_dict().items() if name.startswith('stages.')]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours, strict=True)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), theirs(x), rtol=1e-4, atol=1e-4)
        assert model.head.in_features == 512 and model.head.hidden.split_size == 256
        flat = theirs(x).flatten(1)
        state, splits = model.state_dict(), [flat[:, :256], flat[:, 256:]] * 2
        torch.testing.assert_close(model(x), spinal_by_hand(state, splits), rtol=1e-4, atol=1e-4)


def test_plain_classifier_of_vgg_has_dropout_behind_each_hidden_layer():
    rates = [[m.p for m in part.modules() if isinstance(m, torch.nn.Dropout)] for part in (
        *timm.create_model('vgg11_bn_cifar', device='meta').head.hidden,
        timm.create_model('vgg11_bn_cifar', device='meta').head.drop)]
    assert rates == [[], [0.5], [0.5]]
