"""Classifiers with hidden layers: VGG under a head as in the papers, behind its hidden layers, and other families."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_spinal


def params(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name, backbone, total, head', [
    ('vgg19_bn_spinal', 'vgg19_bn', 74_614_602, 54_579_210),
    ('vgg16_bn_spinal', 'vgg16_bn', 69_302_346, 54_579_210),
    ('vgg11_bn_pspinal', 'vgg11_bn', 29_796_074, 20_570_090),
])
def test_papers_networks(name, backbone, total, head):
    model = timm.create_model(name, num_classes=10, device='meta')
    assert (params(model), params(model.attached_head)) == (total, head)
    assert model.attached_head.in_features == model.num_features * 49 == 25_088
    assert total - head == params(timm.create_model(backbone, features_only=True, device='meta'))
    x = torch.zeros(2, 3, 224, 224, device='meta')
    assert model(x).shape == (2, 10)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(3, reset_other=True)
    assert model(x).shape == (2, 3) and params(model.attached_head) == 3 * 25_089


def test_the_form_behind_the_hidden_layers():
    model = timm.create_model('vgg19_bn_spinal', num_classes=10, device='meta', head_reset_other=False)
    assert params(model) == 144_588_618 and model.attached_head.in_features == 4096
    linear = timm_spinal.attach_head(timm.create_model('vgg11', device='meta'), 'linear')
    assert linear.attached_head.in_features == 4096


def test_the_head_reads_the_flat_map_as_torchvisions_vgg_does():
    torch.manual_seed(0)
    model = timm_spinal.attach_head(timm.create_model('vgg11_bn'), 'spinal', num_classes=3, head_width=4).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        flat = torch.nn.functional.adaptive_avg_pool2d(model.forward_features(x), 7).flatten(1)
        torch.testing.assert_close(model(x), model.attached_head(flat))


@pytest.mark.slow
def test_weights_of_either_form(tmp_path):
    torch.manual_seed(0)
    forms = {}
    for name, options in (('instead', {}), ('behind', dict(head_reset_other=False))):
        model = timm.create_model('vgg11_bn_pspinal', num_classes=3, head_width=4, **options).eval()
        save_for_hf(model, tmp_path / name, safe_serialization=True)
        forms[name] = model
    x = torch.randn(1, 3, 64, 64)
    for name, model in forms.items():
        again = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
    config = tmp_path / 'behind' / 'config.json'  # as it was written before the option was there
    saved = json.loads(config.read_text())
    assert saved['model_args'].pop('head_reset_other') is False
    config.write_text(json.dumps(saved))
    with pytest.raises(RuntimeError, match='the head is behind the hidden layers of VGG; pass head_reset_other=False'):
        timm.create_model(f'local-dir:{tmp_path / "behind"}', pretrained=True)


@pytest.mark.slow
def test_backbone_weights_load_either_way(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model('vgg11_bn')
    overlay = dict(file='', state_dict=plain.state_dict())
    for options in ({}, dict(head_reset_other=False)):
        model = timm.create_model(
            'vgg11_bn_pspinal', pretrained=True, head_width=4, num_classes=3, pretrained_cfg_overlay=overlay, **options)
        for name, value in model.state_dict().items():
            assert name.startswith('attached_head.') or torch.equal(value, plain.state_dict()[name])
    broken = {name: value for name, value in plain.state_dict().items() if name != 'features.0.weight'}
    with pytest.raises(RuntimeError, match='lack 1 keys of the backbone, such as features.0.weight'):
        timm.create_model('vgg11_bn_pspinal', pretrained=True, pretrained_cfg_overlay=dict(file='', state_dict=broken))


@pytest.mark.parametrize('backbone, kept, dropped', [
    ('hgnet_tiny', 2048, 768), ('inception_next_tiny', 2304, 768), ('efficientvit_b0', 1280, 128),
    ('convnext_tiny', 768, 768)])
def test_families_whose_hidden_layers_timm_drops_when_asked(backbone, kept, dropped):
    for options, width in (({}, kept), (dict(head_reset_other=True), dropped)):
        model = timm_spinal.attach_head(timm.create_model(backbone, device='meta'), 'spinal', num_classes=5, **options)
        assert model.attached_head.in_features == width
        assert model(torch.zeros(2, *model.pretrained_cfg['input_size'], device='meta')).shape == (2, 5)


def test_refused_where_there_are_none():
    with pytest.raises(ValueError, match='head_reset_other=True: the classifier of resnet18 has no hidden layers'):
        timm_spinal.attach_head(timm.create_model('resnet18', device='meta'), 'spinal', head_reset_other=True)
