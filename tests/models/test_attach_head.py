"""attach_head on models of many families: what timm promises of a model still holds."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from timm_spinal import attach_head
from timm_spinal.models.attach_head import CLASSIFIER_NAME

# one small model per way in which timm builds its classifier
BACKBONES = (
    'resnet18',  # fc
    'test_byobnet',  # head.fc of a ClassifierHead
    'test_convnext',  # head.fc behind a norm
    'test_efficientnet',  # classifier
    'test_vit',  # head, tokens
    'mobilenetv3_small_050',  # conv_head between pooling and classifier
    'resnetv2_50x1_bit',  # 1x1 convolution as classifier
    'deit_tiny_distilled_patch16_224',  # two classifiers, averaged
)


def make(name: str, head: str = 'spinal', **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return attach_head(timm.create_model(name, num_classes=5), head, head_width=16, **kwargs)


def image(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    size = 64 if not model.pretrained_cfg.get('fixed_input_size') else model.pretrained_cfg['input_size'][-1]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', BACKBONES)
def test_logits_come_from_timms_embedding(name):
    """Backbone weights and names stay; the head reads what timm's own model gives without a classifier."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).eval()
    model = attach_head(copy.deepcopy(plain), 'pspinal', head_width=16).eval()
    classifier = get_pretrained_cfg(name).classifier
    removed = (classifier,) if isinstance(classifier, str) else classifier
    kept = {k: v for k, v in plain.state_dict().items() if not k.startswith(tuple(f'{c}.' for c in removed))}
    state = model.state_dict()
    assert kept.keys() == {k for k in state if not k.startswith('attached_head.')}
    assert all(torch.equal(v, state[k]) for k, v in kept.items())

    plain.reset_classifier(0)
    x = image(model)
    embedding = plain(x)
    with torch.no_grad():
        assert torch.equal(model(x), model.attached_head(embedding))
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(pre_logits, model.attached_head.hidden(embedding))
    assert pre_logits.shape[1] == model.head_hidden_size == embedding.shape[1] + 4 * 16


@pytest.mark.parametrize('name', BACKBONES)
def test_reset_classifier(name):
    model = make(name).eval()
    x = image(model)
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
        hidden = copy.deepcopy(model.attached_head.hidden.state_dict())
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(x), pre_logits)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.num_classes == model.get_classifier().out_features == 7
        assert all(torch.equal(v, hidden[k]) for k, v in model.attached_head.hidden.state_dict().items())
        model.reset_classifier(3, reset_other=True)
        assert [n for n, _ in model.attached_head.named_parameters()] == ['fc.weight', 'fc.bias']
        assert model(x).shape == (2, 3)
        assert model.head_hidden_size == model.get_classifier().in_features


@pytest.mark.parametrize('name', ['resnet18', 'test_byobnet', 'test_efficientnet', 'test_convnext'])
def test_pooling_off_gives_timms_map_and_on_again_the_head(name):
    plain = timm.create_model(name, num_classes=5).eval()
    model = attach_head(copy.deepcopy(plain), 'spinal', head_width=16).eval()
    x = image(model)
    with torch.no_grad():
        logits = model(x)
        plain.reset_classifier(0, '')
        model.reset_classifier(5, '')
        assert torch.equal(model(x), plain(x))
        assert model.head_hidden_size == plain.head_hidden_size
        model.reset_classifier(0, 'avg')
        model.reset_classifier(5)
    assert model(x).shape == logits.shape


def test_pooling_that_changes_the_width_makes_the_hidden_layers_anew():
    model = make('resnet18')
    model.reset_classifier(5, 'catavgmax')
    assert model.attached_head.in_features == 1024
    assert model(image(model)).shape == (2, 5)


def test_classifier_names_and_order():
    model = make('resnet18')
    names = [name for name, _ in model.named_parameters()]
    assert names[-2:] == ['attached_head.fc.weight', 'attached_head.fc.bias']  # AGC leaves out the last two
    assert model.get_classifier() is model.attached_head.fc
    assert model.get_classifier(name_only=True) == CLASSIFIER_NAME == model.pretrained_cfg['classifier']
    assert model.pretrained_cfg['architecture'] == 'resnet18_spinal'


@pytest.mark.parametrize('training', [True, False])
def test_keeps_mode_dtype_device_and_frozen_parameters(training):
    model = timm.create_model('test_resnet', device='meta', dtype=torch.float64).train(training)
    model.requires_grad_(False)
    attach_head(model, 'spinal', head_width=8)
    head = {f'attached_head.{n}' for n, _ in model.attached_head.named_parameters()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == head
    assert all(t.dtype == torch.float64 for t in model.parameters())
    assert all(t.device.type == 'meta' for t in [*model.parameters(), *model.buffers()])
    assert all(m.training == training for m in model.modules())
    model.requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, '')
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(3, 'avg')
    assert all(p.device.type == 'meta' and p.dtype == torch.float64 for p in model.parameters())
    assert all(m.training == training for m in model.modules())


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_copies_and_state(name):
    model = make(name).eval()
    x = image(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(x), expected)
        other.reset_classifier(2)
        assert other(x).shape == (2, 2)
    fresh = make(name, num_classes=5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), expected)
    assert isinstance(model, type(timm.create_model(name)))


def test_prune_drops_what_gets_no_gradient():
    model = make('resnet18')
    model.prune_intermediate_layers([1, 2])
    model(image(model)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.head_hidden_size == model.num_features == 128


def test_prune_can_keep_the_head():
    model = make('resnet18').eval()
    x = image(model)
    expected = model(x)
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(x), expected)
    assert model.head_hidden_size == model.attached_head.hidden_size


def test_attached_head_can_be_replaced():
    model = make('test_resnet', 'spinal')
    in_features = model.attached_head.in_features
    attach_head(model, 'pspinal', num_classes=9, head_width=4)
    assert model.pretrained_cfg['architecture'] == 'test_resnet_pspinal'
    assert model.attached_head.in_features == in_features
    assert model(image(model)).shape == (2, 9)
    assert model._model_args['head_width'] == 4
    attach_head(model, 'linear')
    assert 'head_width' not in model._model_args
    assert model(image(model)).shape == (2, 9)


def test_scripted_and_traced():
    model = make('resnet18').eval()
    x = image(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(head='spinl'), ValueError, "Unknown head 'spinl'.*Did you mean 'spinal'"),
    (dict(head='spinal', head_widht=4), TypeError, "no option 'widht'.*Did you mean 'width'"),
    (dict(head='spinal', width=4), TypeError, "Unknown option 'width'.*begin with 'head_'"),
    (dict(head='spinal', head_layers=1), ValueError, 'layers .1. must be at least splits'),
])
def test_bad_options_leave_the_model_as_it_was(kwargs, error, message):
    model = timm.create_model('test_resnet')
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        attach_head(model, **kwargs)
    assert list(model.state_dict()) == keys and not hasattr(model, 'attached_head')
    assert model.num_classes == 1000


@pytest.mark.parametrize('model', [torch.nn.Linear(2, 2), timm.create_model('test_resnet', features_only=True)])
def test_what_is_no_timm_classifier_is_refused(model):
    with pytest.raises(ValueError, match='cannot take a head: it has no .*timm.create_model'):
        attach_head(model, 'spinal')
