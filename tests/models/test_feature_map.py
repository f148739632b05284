"""Capsule heads on timm models: they read the map that timm gives without pooling."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import load_state_dict, save_for_hf

from timm_spinal import attach_head
from timm_spinal.models import head_variants

# NCHW, pre-classifier convolution behind the pooling, norm in the head, NHWC
BACKBONES = ('resnet18', 'mobilenetv3_small_050', 'test_convnext', 'test_efficientnet')


def make(name, head='xnodr', **kwargs):
    torch.manual_seed(0)
    return attach_head(timm.create_model(name, num_classes=5), head, **kwargs)


def image(batch=2, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', BACKBONES)
def test_head_reads_timms_map(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).eval()
    model = attach_head(copy.deepcopy(plain), 'xnidr').eval()
    plain.reset_classifier(0, '')
    x = image()
    with torch.no_grad():
        features = plain(x)
        assert features.ndim == 4
        assert torch.equal(model(x), model.attached_head(features))
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(pre_logits, model.attached_head.hidden(features))
    assert pre_logits.shape[1] == model.head_hidden_size
    kept = plain.state_dict()
    assert {k for k in model.state_dict() if not k.startswith('attached_head.')} == set(kept)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items())


def test_nhwc_map():
    model = attach_head(timm.create_model('swin_tiny_patch4_window7_224', device='meta'), 'caps', num_classes=3)
    assert model.attached_head.channels_last and model.attached_head.in_features == 768
    assert model(torch.zeros(2, 3, 224, 224, device='meta')).shape == (2, 3)
    model.reset_classifier(0, '')
    assert model(torch.zeros(2, 3, 224, 224, device='meta')).shape == (2, 7, 7, 768)


@pytest.mark.parametrize('name', BACKBONES)
def test_reset_classifier(name):
    model = make(name).eval()
    x = image()
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), pre_logits)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.num_classes == 7
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pre_logits)
        model.reset_classifier(0, '')
        features = model(x)
        assert features.ndim == 4
        model.reset_classifier(4, 'avg')
        assert model(x).shape == (2, 4) and model.head_hidden_size == pre_logits.shape[1]
        model.reset_classifier(3, reset_other=True)
    assert [n for n, _ in model.attached_head.named_parameters()] == ['fc.weight', 'fc.bias']
    assert model(x).shape == (2, 3) and model.head_hidden_size == model.get_classifier().in_features


def test_resnets_get_the_papers_bottleneck():
    assert hasattr(make('resnet18').attached_head.hidden.block, 'conv3')
    assert hasattr(make('resnet18', head_primary='depthwise').attached_head.hidden.block, 'conv_dw')
    assert hasattr(make('test_efficientnet').attached_head.hidden.block, 'conv_dw')


def test_heads_can_be_exchanged():
    model = make('resnet18', 'spinal').eval()
    x = image()
    vector = timm.create_model('resnet18', num_classes=0).eval()
    vector.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('attached_head.')})
    attach_head(model, 'caps', num_classes=4)
    assert model(x).shape == (2, 4) and model.pretrained_cfg['architecture'] == 'resnet18_caps'
    attach_head(model, 'linear')
    torch.testing.assert_close(model(x), model.attached_head.fc(vector(x)))
    assert model.head_hidden_size == 512


def test_copies_prune_and_backward():
    model = make('resnet18').eval()
    x = image()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    model.prune_intermediate_layers([1, 2])
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ['resnet18', 'test_convnext'])
def test_safetensors_round_trip(name, tmp_path):
    head_variants.register_head_variant(name, 'xnodr')
    torch.manual_seed(0)
    model = timm.create_model(f'{name}_xnodr', num_classes=5, head_iterations=2).eval()
    model.train()(image(4))
    save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    assert load_state_dict(str(tmp_path / 'model.safetensors')).keys() == model.state_dict().keys()
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = image()
    assert torch.equal(again(x), model(x)) and again.attached_head.fc.iterations == 2
    fewer = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).eval()
    assert fewer(x).shape == (2, 3)
    assert torch.equal(fewer.attached_head.hidden.norm.running_var, model.attached_head.hidden.norm.running_var)
    assert torch.equal(fewer.attached_head.scores.norm.running_var, torch.ones(16))  # made for the classes


@pytest.mark.parametrize('name, kwargs, message', [
    ('resnet18', dict(head_capsules=5), '5 capsules of dimension 8 do not divide the 512 channels; use capsules=64'),
    ('resnet18', dict(num_classes=1), 'needs at least 2, got num_classes 1; use 2 classes'),
    ('resnet18', dict(head_primary='mobile'), "Unknown primary block 'mobile'"),
])
def test_refusals_leave_the_model_as_it_was(name, kwargs, message):
    model = timm.create_model(name, num_classes=5)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach_head(model, 'xnodr', **kwargs)
    assert list(model.state_dict()) == keys and model.num_classes == 5
    assert not hasattr(model, 'attached_head') and model(image(size=160)).shape == (2, 5)


def test_other_pooling_is_refused():
    with pytest.raises(ValueError, match="global_pool cannot be 'max'; use 'avg'"):
        timm.create_model('resnet18_caps', global_pool='max')
    model = make('resnet18')
    with pytest.raises(ValueError, match="global_pool cannot be 'catavgmax'"):
        model.reset_classifier(3, 'catavgmax')
    assert model(image()).shape == (2, 5)


def test_tokens_can_be_cut_into_vector_capsules():
    model = make('test_vit', head_primary='vector').eval()
    assert model(image(size=160)).shape == (2, 5)
    assert model.attached_head.hidden.capsules == model.num_features // 8


def test_a_model_that_gives_neither_map_nor_tokens_is_refused():
    with pytest.raises(ValueError, match='deit_tiny_distilled_patch16_224 gives no map, but the head reads a feature '
                                         'map; .*head_primary=.vector'):
        attach_head(timm.create_model('deit_tiny_distilled_patch16_224', device='meta'), 'xnodr')
