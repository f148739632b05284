"""Folding of BatchNorm is exact, in plain and in IC convolutions; packed capsule heads save and load as timm does."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import timm_spinal
from timm_spinal import convert_to_ic, fold_batchnorm

X = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(name, gain=0.5, **ic):
    """A model with a past, in float64; gains are gain + |N(0, 1)|."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    if ic:
        convert_to_ic(model, **{key: value for key, value in ic.items() if key != 'on'})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.)
            nn.init.normal_(module.weight).data.abs_().add_(gain)
            nn.init.normal_(module.bias)
    for key, p in model.named_parameters():
        if 'ic_weight' in key or 'ic_bias' in key:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize('name, ic', [
    ('resnet18', {}),
    ('resnet18', dict(on=True)),
    ('resnet18', dict(norm='bias', mode='layer')),
    ('test_resnet', dict(norm='bn')),
    ('test_resnet', dict(mode='pair', scale='raw', scope='all')),
    ('tf_efficientnet_lite0', {}),  # convolutions that pad as TensorFlow's
    ('test_efficientnet', dict(on=True)),  # norms that have an activation in them
    ('resnet20_cifar', dict(on=True)),
])
def test_nothing_changes_but_the_norms(name, ic):
    model = make(name, **ic)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected, folded = model(X), fold_batchnorm(model)
        torch.testing.assert_close(folded(X), expected, rtol=1e-9, atol=1e-9)
    inner = sum(key.endswith('ic_bn.weight') for key in state)
    assert norms(folded) == inner < norms(model) and expected.std() > 0.01
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_collision_with_a_negative_gain_keeps_its_norm():
    model = make('resnet18', on=True)
    model.layer1[0].bn1.weight.data[3] = -0.5
    folded = fold_batchnorm(model)
    assert norms(folded) == 1 and isinstance(folded.layer1[0].bn1, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(folded(X), model(X), rtol=1e-9, atol=1e-9)
    plain = make('resnet18', gain=-1.)
    assert norms(fold_batchnorm(plain)) == 0 and any((m.weight < 0).any() for m in plain.modules()
                                                     if isinstance(m, nn.BatchNorm2d))


def test_zero_gain():
    model = make('resnet18', on=True)
    nn.init.zeros_(model.layer2[0].bn2.weight)
    with torch.no_grad():
        torch.testing.assert_close(fold_batchnorm(model)(X), model(X), rtol=1e-9, atol=1e-9)


class ByShape(nn.Module):
    """What it does depends on the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.mean() > 0 else x


def test_what_cannot_be_folded():
    with pytest.raises(ValueError, match='in training mode'):
        fold_batchnorm(timm.create_model('resnet18', device='meta'))
    with pytest.raises(ValueError, match='torch.fx cannot trace ByShape') as error:
        fold_batchnorm(ByShape().eval())
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='VisionTransformer has no BatchNorm behind a convolution'):
        fold_batchnorm(timm.create_model('test_vit').eval())
    with pytest.raises(ValueError, match='Sequential has no BatchNorm behind a convolution'):
        fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval())
    assert timm_spinal.fold_batchnorm is fold_batchnorm


def trained(name, **kwargs):
    """A small model whose scores are not near zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).train()
    head = getattr(model, 'attached_head', None) or model.head
    torch.nn.init.normal_(head.fc.weight, 0., 0.5)
    x = IMAGES if model.in_chans == 3 else IMAGES[:, :1, :28, :28]
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
    assert model(IMAGES).shape == (4, 4) and model.attached_head.fc.weight.requires_grad
    assert torch.equal(model.conv1.weight, packed.conv1.weight)


@pytest.mark.parametrize('name, message', [
    ('resnet18', "ResNet has no capsule head; give a model with the head 'xnodr' or 'xnidr'"),
    ('resnet18_spinal', 'has no capsule head'),
    ('resnet18_caps', 'Only a layer with one binarised product'),
    ('vgg5', 'has no capsule head'),
])
def test_other_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        timm_spinal.pack_xnodr(timm.create_model(name, num_classes=3, device='meta'))


def test_attached_head_option():
    model = timm_spinal.attach_head(timm.create_model('test_resnet'), 'xnodr', num_classes=3, head_packed=True).eval()
    with torch.no_grad():
        assert model(IMAGES).shape == (4, 3)
    assert model.attached_head.packed
    with pytest.raises(ValueError, match='cannot be reset to 5 classes'):
        model.reset_classifier(5)
    model.reset_classifier(0)
    assert model.num_classes == 0
