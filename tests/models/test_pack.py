"""pack_xnodr: whole models, saved and loaded as timm does."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import timm_spinal

X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(name, **kwargs):
    """A small model whose scores are not near zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).train()
    head = getattr(model, 'attached_head', None) or model.head
    torch.nn.init.normal_(head.fc.weight, 0., 0.5)
    x = X if model.in_chans == 3 else X[:, :1, :28, :28]
    with torch.no_grad():
        for m in model.modules():
            if hasattr(m, 'running_var'):
                m.momentum = None
        for _ in range(3):
            model(x)
        return model.eval(), x, model.eval()(x)


@pytest.fixture(scope='module', params=['resnet18_xnodr', 'mobilenetv3_large_100_xnidr', 'capsnet_mnist'])
def pair(request):
    kwargs = dict(head='xnodr') if request.param == 'capsnet_mnist' else {}
    model, x, scores = trained(request.param, **kwargs)
    return model, timm_spinal.pack_xnodr(copy.deepcopy(model)), x, scores


@torch.no_grad()
def test_predictions_are_identical(pair):
    model, packed, x, scores = pair
    found = packed(x)
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.argmax(1), scores.argmax(1)) and scores.max() > 0.1
    torch.testing.assert_close(packed.forward_features(x), model.forward_features(x))


@torch.no_grad()
def test_saved_and_loaded(pair, tmp_path):
    model, packed, x, _ = pair
    save_for_hf(packed, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['model_args']['head_packed'] is True and config['num_classes'] == 7
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), packed(x))
    assert load_file(tmp_path / 'model.safetensors').keys() == packed.state_dict().keys()
    with pytest.raises(ValueError, match='packed weights are for 7 classes, the model has 4; create it with num_cl'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4)
    with pytest.raises(ValueError, match='packed capsule weights do not fit a float model'):
        model.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    with pytest.raises(ValueError, match='packed capsule weights do not fit a float model'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, head_packed=False)


@torch.no_grad()
def test_without_classes_a_saved_model_returns_its_pre_logits(pair, tmp_path):
    """Packed or float, as the model itself does after ``reset_classifier(0)``."""
    for model in pair[:2]:
        x = pair[2]
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0).eval()
        assert torch.equal(again(x), expected) and again(x).shape == (len(x), model.head_hidden_size)
        model = copy.deepcopy(model)
        model.reset_classifier(0)
        assert torch.equal(model(x), expected)


def test_sizes_of_files(tmp_path):
    """A head without primary block is all capsule layer."""
    model = timm.create_model('capsnet_mnist', head='xnodr')
    file, sizes = tmp_path / 'head.safetensors', []
    for m in (model, timm_spinal.pack_xnodr(copy.deepcopy(model))):
        save_file(m.head.state_dict(), file)
        sizes.append(file.stat().st_size)
    assert sizes[0] > 4 * 512 * 10 * 8 * 16 and sizes[0] > 6 * sizes[1]


def test_float_weights_into_a_packed_model(tmp_path):
    model = trained('resnet18_xnodr')[0]
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match='float capsule weights do not fit a packed model; create it without'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, head_packed=True)


def test_packed_backbone_for_other_classes_with_a_new_float_head(tmp_path):
    """What is made for the classes is left out, as for float weights."""
    packed = timm_spinal.pack_xnodr(trained('resnet18_xnodr')[0])
    save_for_hf(packed, str(tmp_path), safe_serialization=True)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4, head_packed=False)
    assert model(X).shape == (4, 4) and model.attached_head.fc.weight.requires_grad
    assert torch.equal(model.conv1.weight, packed.conv1.weight)


@pytest.mark.parametrize('name, message', [
    ('resnet18', "ResNet has no capsule head; give a model with the head 'xnodr' or 'xnidr'"),
    ('resnet18_spinal', 'has no capsule head'),
    ('resnet18_caps', 'Only a layer with one xnorized product'),
    ('vgg5', 'has no capsule head'),
])
def test_other_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        timm_spinal.pack_xnodr(timm.create_model(name, num_classes=3, device='meta'))


def test_attached_head_option():
    model = timm_spinal.attach_head(timm.create_model('test_resnet'), 'xnodr', num_classes=3, head_packed=True).eval()
    with torch.no_grad():
        assert model(X).shape == (4, 3)
    assert model.attached_head.packed
    with pytest.raises(ValueError, match='cannot be reset to 5 classes'):
        model.reset_classifier(5)
    model.reset_classifier(0)
    assert model.num_classes == 0
