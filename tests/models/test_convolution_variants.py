"""Registered `ic<model>` models: names, cfgs, weights in and out."""

import logging

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, save_for_hf

import timm_spinal
from timm_spinal import ensure_registered, list_models, register_ic_variant
from timm_spinal.layers import ICConv2d
from timm_spinal.models.convolutions import CONVOLUTIONS

# docs/papers/ic_networks.md, section 5; the CIFAR nets by 6 n (16 + 32 + 64) + the plain count
COUNTS = {
    'icresnet18': 11_693_352, 'icresnet34': 21_805_224, 'icresnet50': 25_560_808, 'icresnet101': 44_557_288,
    'icresnext50_32x4d': 25_036_456, 'icseresnet50': 28_091_800,
    'icresnet20_cifar': 269_722 + 672, 'icresnet32_cifar': 464_154 + 1_120, 'icresnet56_cifar': 853_018 + 2_016,
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def trained():
    """As after training: no two collisions alike."""
    torch.manual_seed(0)
    model = timm.create_model('icresnet20_cifar', num_classes=7, ic_norm='bias').eval()
    for name, p in model.named_parameters():
        if '.ic_' in name:
            torch.nn.init.normal_(p)
    return model


@pytest.fixture(scope='module')
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    save_for_hf(trained, str(folder), safe_serialization=True)
    return folder


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_counts(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert model.pretrained_cfg['architecture'] == name


def test_every_row_of_the_table_is_registered_and_counted():
    assert {f'ic{backbone}' for backbone in CONVOLUTIONS['ic'].backbones} == set(COUNTS) <= set(list_models('ic*'))


@pytest.mark.parametrize('backbone', [name for name in CONVOLUTIONS['ic'].backbones if not name.endswith('_cifar')])
def test_tags_point_at_timms_own_weights(backbone):
    ours, timms = get_pretrained_cfg(f'ic{backbone}'), get_pretrained_cfg(backbone)
    assert ours.tag == f'backbone_{timms.tag}' and ours.hf_hub_id == timms.hf_hub_id and ours.hf_hub_id
    assert ours.input_size == timms.input_size and ours.classifier == timms.classifier
    assert f'ic{backbone}.{ours.tag}' in list_models(pretrained=True)
    timm_spinal.register_head_variant(f'ic{backbone}', 'pspinal')
    headed = get_pretrained_cfg(f'ic{backbone}_pspinal')
    assert headed.tag == ours.tag and headed.hf_hub_id == timms.hf_hub_id


def test_options_classes_and_channels():
    model = timm.create_model(
        'icresnet18', num_classes=37, in_chans=1, ic_scope='all', ic_mode='pair', ic_init=0.5, ic_norm='bn',
        ic_scale='raw')
    conv = model.layer1[0].conv1
    assert isinstance(model.conv1, ICConv2d) and model.conv1.ic_weight.shape == (64, 1)
    assert conv.ic_weight.shape == (64, 64) and torch.allclose(conv.ic_weight, torch.tensor(0.5 / 576))
    assert isinstance(conv.ic_bn, torch.nn.BatchNorm2d) and model.fc.out_features == 37
    with pytest.raises(TypeError, match='ic_scpoe'):
        timm.create_model('icresnet18', ic_scpoe='all')
    with pytest.raises(ValueError, match="ic_scope 'sptial' is unknown"):
        timm.create_model('icresnet18', ic_scope='sptial')


def test_plain_weights_load_and_the_collision_is_said_to_be_new(tmp_path, caplog):
    torch.manual_seed(1)
    plain = timm.create_model('resnet18', num_classes=11)
    file = tmp_path / 'resnet18.safetensors'
    safetensors.torch.save_file(plain.state_dict(), file)
    with caplog.at_level(logging.INFO):
        model = timm.create_model(
            'icresnet18', pretrained=True, num_classes=11, pretrained_cfg_overlay=dict(file=str(file), num_classes=11))
    lines = [r.getMessage() for r in caplog.records if 'icresnet18:' in r.getMessage()]
    assert len(lines) == 1 and '16 tensors of the collision are new' in lines[0]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items() if 'running' not in name)
    assert {name for name in state if name not in plain.state_dict()} == {n for n in state if n.endswith('.ic_weight')}
    assert 'state_dict' not in model.pretrained_cfg and model.pretrained_cfg['architecture'] == 'icresnet18'
    assert 'statistics nearly fit' in lines[0]  # rare collisions; where a start is asked for, it is that one
    assert all(conv.ic_weight.mean() > 1.5 for conv in model.modules() if isinstance(conv, ICConv2d))
    fresh = timm.create_model(
        'icresnet18', pretrained=True, ic_init=1., pretrained_cfg_overlay=dict(file=str(file), num_classes=11))
    assert all((conv.ic_weight == 1.).all() for conv in fresh.modules() if isinstance(conv, ICConv2d))

    caplog.clear()
    assert ensure_registered('icresnet18_spinal')
    headed = timm.create_model(
        'icresnet18_spinal', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=str(file)))
    assert torch.equal(headed.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    assert any('its spinal head is new' in r.getMessage() for r in caplog.records)


def test_a_saved_model_loads_back_whole_with_other_classes_and_as_features(trained, saved, caplog):
    with caplog.at_level(logging.INFO):
        model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    assert torch.equal(model(X), trained(X)) and 'collision' not in caplog.text
    features = trained.forward_features(X)
    other_classes = timm.create_model(f'local-dir:{saved}', pretrained=True, num_classes=3).eval()
    assert torch.equal(other_classes.forward_features(X), features) and other_classes(X).shape == (2, 3)
    maps = timm.create_model(f'local-dir:{saved}', pretrained=True, features_only=True).eval()(X)
    assert torch.equal(maps[-1], features)


def test_incomplete_weights_are_refused(saved, tmp_path):
    state = safetensors.torch.load_file(saved / 'model.safetensors')
    del state['stages.1.0.conv1.ic_bias']
    file = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(state, file)
    with pytest.raises(RuntimeError, match="lack 1 keys of the collision, such as 'stages.1.0.conv1.ic_bias'"):
        timm.create_model(
            'icresnet20_cifar', pretrained=True, num_classes=7, ic_norm='bias',
            pretrained_cfg_overlay=dict(file=str(file), num_classes=7))


def test_register_any_other_model_and_load_a_converted_one(tmp_path):
    torch.manual_seed(0)
    model = timm_spinal.convert_to_ic(timm.create_model('test_resnet', num_classes=4), 'block', init=0.25).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert register_ic_variant('test_resnet') == register_ic_variant('test_resnet') == 'ictest_resnet'
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(X), model(X)) and again.layer1[0].conv1.ic_init == 0.25


def test_names_that_are_registered_when_asked_for():
    for name in ('icregnety_016', 'icvgg11_bn_spinal', 'icresnet50_pspinal.backbone_a1_in1k', 'icresnet18_cifar'):
        assert ensure_registered(name)
    model = timm.create_model('icvgg11_bn_spinal', num_classes=3, ic_mode='layer', head_width=8, device='meta')
    assert sum(isinstance(module, ICConv2d) for module in model.modules()) == 7
    assert not ensure_registered('icnonsense') and not ensure_registered('icresnet18_nonsense')
    with pytest.raises(ValueError, match="Unknown timm model 'resnet5'.*Did you mean 'resnet"):
        register_ic_variant('resnet5')


def test_a_head_on_icresnet50_is_a_name_of_timm():
    torch.manual_seed(0)
    model = timm.create_model('icresnet50_pspinal', num_classes=5).eval()
    assert sum(p.numel() for name, p in model.named_parameters() if name.endswith('ic_weight')) == 3_776
    assert model(X).shape == (2, 5) and model.forward_features(X).shape == (2, 2048, 1, 1)
    maps = timm.create_model('icresnet50', features_only=True).eval()(X)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 16), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)]
