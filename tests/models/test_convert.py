"""Which convolutions convert_to_ic replaces, and what it leaves as it was."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import timm_spinal
from timm_spinal import convert_to_ic
from timm_spinal.cost import count_macs
from timm_spinal.layers import ICConv2d
from timm_spinal.models.convert import find_convs
from timm_spinal.models.convolutions import CONVOLUTIONS

# docs/papers/ic_networks.md, section 5: convolutions, and parameters of w' for each filter.
TABLE = [
    ('resnet18', 'spatial', 16, 3_840), ('resnet18', 'block', 16, 3_840), ('resnet18', 'all', 20, 4_800),
    ('resnet34', 'spatial', 32, 7_552), ('resnet34', 'block', 32, 7_552), ('resnet34', 'all', 36, 8_512),
    ('resnet50', 'spatial', 16, 3_776), ('resnet50', 'block', 48, 22_656), ('resnet50', 'all', 53, 26_560),
    ('resnet101', 'spatial', 33, 8_128), ('resnet101', 'block', 99, 48_768), ('resnet101', 'all', 104, 52_672),
    ('resnext50_32x4d', 'spatial', 16, 7_552), ('resnext50_32x4d', 'block', 48, 30_208),
    ('resnext50_32x4d', 'all', 53, 34_112),
    ('seresnet50', 'spatial', 16, 3_776), ('seresnet50', 'block', 48, 22_656), ('seresnet50', 'all', 53, 26_560),
    ('vgg16_bn', 'spatial', 12, 4_160), ('vgg16_bn', 'block', 12, 4_160), ('vgg16_bn', 'all', 13, 4_224),
    ('mobilenetv2_100', 'spatial', 17, 7_136), ('mobilenetv2_100', 'block', 51, 17_024),
]
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ic_convs(model: nn.Module) -> list:
    return [name for name, module in model.named_modules() if isinstance(module, ICConv2d)]


def make(name: str = 'test_resnet', **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


@pytest.mark.parametrize('name, scope, convs, params', TABLE)
def test_scopes(name, scope, convs, params):
    model = timm.create_model(name, device='meta')
    plain = count(model)
    convert_to_ic(model, scope, depthwise=name == 'mobilenetv2_100')
    assert len(ic_convs(model)) == convs and count(model) - plain == params


@pytest.mark.parametrize('options, params', [
    (dict(norm='bias'), 7_552), (dict(norm='bn'), 11_328), (dict(mode='layer'), 16), (dict(mode='pair'), 1_257_472),
    (dict(mode='pair', scope='block'), 10_616_832)])
def test_parameters_of_the_options(options, params):
    model = timm.create_model('resnet50', device='meta')
    plain = count(model)
    assert count(convert_to_ic(model, **options)) - plain == params


def test_macs():
    """No dense all-ones convolution; with four operations per value and its box sums still half of resnet101."""
    x = torch.empty(1, 3, 224, 224, device='meta')
    names = ('resnet50', 'icresnet50', 'resnet101')
    plain, ic, deeper = (count_macs(timm.create_model(name, device='meta').eval(), x) for name in names)
    assert ic == plain
    model, elementwise = timm.create_model('icresnet50', device='meta').eval(), 0

    def add(module, args, output):
        nonlocal elementwise
        elementwise += args[0].numel() + 9 * output[:, 0].numel() + 4 * output.numel()

    for name in ic_convs(model):
        model.get_submodule(name).register_forward_hook(add)
    model(x)
    assert 5_500_000 < elementwise < 8_000_000  # 5.5 M + about 2 M
    assert (ic + elementwise) / deeper < 0.54
    pairs = timm.create_model('icresnet50', ic_mode='pair', device='meta').eval()
    # docs/papers/ic_networks.md, section 5: 218 M with 12.4 M of box sums
    assert round((count_macs(pairs, x) - plain) / 1e6) == 206


@pytest.mark.parametrize('name, scope, stay', [
    ('mobilenetv3_small_050', 'block', ['blocks.0.0.se.conv_reduce', 'conv_head']),
    ('vgg11', 'all', ['pre_logits.fc1', 'pre_logits.fc2']),
    ('resnet18', 'block', ['conv1', 'layer2.0.downsample.0']),
    ('resnet26d', 'block', ['conv1.0', 'conv1.3', 'conv1.6', 'layer2.0.downsample.1']),
    ('resnetv2_50x1_bit', 'spatial', []),
    ('resnet20_cifar', 'block', ['stages.0.conv']),
])
def test_what_stays(name, scope, stay):
    model = timm.create_model(name, device='meta')
    if not stay:
        with pytest.raises(ValueError, match="IC cannot replace 'stages.0.blocks.0.conv2', a StdConv2d"):
            find_convs(model, CONVOLUTIONS['ic'], scope, True)
        return
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found = set(find_convs(model, CONVOLUTIONS['ic'], scope, True))
    assert set(stay) <= convs and not found & set(stay)
    assert {conv for conv in convs - found if '.se.' not in conv and '.downsample.' not in conv} <= set(stay) | {
        'conv_stem'}


def test_parameters_stay_and_plain_weights_lack_only_the_collision():
    plain = make()
    model = convert_to_ic(copy.deepcopy(plain))
    before = dict(model.named_parameters())
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing == [f'{name}.ic_weight' for name in ic_convs(model)]
    assert list(plain.state_dict()) == [name for name in model.state_dict() if '.ic_' not in name]
    assert all(torch.equal(before[name], p) for name, p in plain.named_parameters())
    weight = plain.layer1[0].conv1.weight
    assert convert_to_ic(plain) is plain and plain.layer1[0].conv1.weight is weight  # optimizers keep their hold


@pytest.mark.parametrize('training', [True, False])
def test_keeps_mode_dtype_device_and_frozen_parameters(training):
    model = make(device='meta', dtype=torch.float64).train(training)
    model.requires_grad_(False)
    convert_to_ic(model, norm='bn')
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if '.ic_' in name}
    assert all(t.device.type == 'meta' for t in [*model.parameters(), *model.buffers()])
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(m.training == training for m in model.modules())


def test_geometry_is_kept():
    model = make('resnet18', output_stride=8)
    geometry = ('kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode', 'in_channels', 'out_channels')
    before = {name: [getattr(m, g) for g in geometry] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    convert_to_ic(model, 'all')
    after = {name: [getattr(m, g) for g in geometry] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert before == after and model.layer4[1].conv2.dilation == (4, 4)
    assert model.eval()(X).shape == (2, 5)


def test_feature_extractors():
    """In place on what features_only makes, with the values of the whole model."""
    for name in ('test_resnet', 'resnet20_cifar', 'test_efficientnet'):
        whole, features = make(name).eval(), make(name, features_only=True).eval()
        features.load_state_dict({
            key: whole.state_dict()[other] for key in features.state_dict() for other in whole.state_dict()
            if other.replace('.', '_') == key.replace('.', '_')})
        convert_to_ic(whole), convert_to_ic(features)
        assert len(ic_convs(whole)) == len(ic_convs(features)) > 0
        with torch.no_grad():
            _, taps = whole.forward_intermediates(X)
            for tap, feature in zip(taps[::-1], features(X)[::-1]):
                torch.testing.assert_close(tap, feature)


def test_copies():
    model = convert_to_ic(make()).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))


@pytest.mark.parametrize('order', ['ic first', 'head first'])
def test_heads_before_and_after(order):
    model = make()
    if order == 'ic first':
        timm_spinal.attach_head(convert_to_ic(model, mode='layer'), 'pspinal', head_width=8)
    else:
        convert_to_ic(timm_spinal.attach_head(model, 'pspinal', head_width=8), mode='layer')
        timm_spinal.attach_head(model, 'pspinal', head_width=8)
    assert model.pretrained_cfg['architecture'] == 'ictest_resnet_pspinal'
    assert model._model_args['ic_mode'] == 'layer' and model._model_args['head_width'] == 8
    assert len(ic_convs(model)) == 7 and model.eval()(X).shape == (2, 5)


def test_convolutions_of_a_head_stay():
    model = timm_spinal.attach_head(make('resnet18'), 'xnodr')
    assert any(isinstance(module, nn.Conv2d) for module in model.attached_head.modules())
    convert_to_ic(model, 'block')
    assert len(ic_convs(model)) == 16 and not any(isinstance(m, ICConv2d) for m in model.attached_head.modules())


@pytest.mark.parametrize('name, options, message', [
    ('test_resnet', dict(scope='spatail'), "ic_scope 'spatail' is unknown; it is one of 'spatial', 'block', 'all'"),
    ('test_resnet', dict(mode='each'), "ic_mode 'each' is unknown"),
    ('test_vit', {}, "test_vit has no convolution for IC in the scope 'spatial'"),
    ('mobilenetv2_035', {}, "in the scope 'spatial' but 17 depthwise ones; give ic_depthwise=True"),
    ('test_nfnet', {}, "test_nfnet: IC cannot replace 'stages.0.0.conv2', a ScaledStdConv2d, only nn.Conv2d itself"),
    ('tf_efficientnet_b0', dict(depthwise=True), "IC cannot replace 'blocks.1.0.conv_dw', a Conv2dSame"),
    ('tf_efficientnet_cc_b0_4e', dict(depthwise=True, scope='block'), 'IC cannot replace .*CondConv2d|Conv2dSame'),
    ('resnet18_sb_s32u1', {}, 'resnet18_sb_s32u1 shares its filters, and IC cannot be combined with shared bases'),
    ('icresnet18', {}, 'icresnet18 has IC convolutions already'),
])
def test_what_cannot_be_converted_stays_as_it_was(name, options, message):
    model = timm.create_model(name, device='meta')
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message) as error:
        convert_to_ic(model, **options)
    assert '\n' not in str(error.value)
    assert all(a is b for a, b in zip(modules, model.modules())) and model.pretrained_cfg['architecture'] == name


def test_what_is_no_model_of_timm():
    with pytest.raises(ValueError, match='Sequential is not a model of timm; pass what timm.create_model returns'):
        convert_to_ic(nn.Sequential(nn.Conv2d(3, 4, 3)))
