"""What every small net must do beside timm's own suite."""

import pickle

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models._manipulate import group_parameters

from timm_spinal.models import spinal_cifar, spinal_cnn, spinal_mlp, spinal_vgg5

MODULES = (spinal_vgg5, spinal_cnn, spinal_mlp, spinal_cifar)
REGISTERED = [name for module in MODULES for name in module.default_cfgs]
NAMES = [name for name in REGISTERED if name.partition('_')[0] not in ('vgg13', 'vgg16', 'vgg19')]  # as vgg11 is


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def images(model, batch=2, size=None, seed=0):
    channels, height, width = model.pretrained_cfg['input_size']
    return torch.randn(batch, channels, *(size or (height, width)), generator=torch.Generator().manual_seed(seed))


def test_names_are_registered_without_weights():
    registered = {name for module in MODULES for name in timm.list_models(module=module.__name__.rsplit('.', 1)[-1])}
    assert registered == set(REGISTERED) and len(REGISTERED) == 24
    assert not [tag for names in ('*vgg5*', 'cifarcnn*', 'resnet18_cifar*') for tag in timm.list_pretrained(names)]


@pytest.mark.parametrize('name', NAMES)
def test_train_step_gives_finite_gradients_for_every_parameter(name):
    model = create(name, num_classes=5).train()
    torch.nn.functional.cross_entropy(model(images(model, 4)), torch.tensor([0, 1, 2, 3])).backward()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad


@pytest.mark.parametrize('name', NAMES)
def test_last_two_parameters_are_the_classifier_and_groups_follow_depth(name):
    model = create(name)
    names = [n for n, _ in model.named_parameters()]
    assert names[-2:] == ['head.fc.weight', 'head.fc.bias']
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert groups['head.fc.weight'] == max(groups.values()) and groups[names[0]] == 0
    backbone = [groups[n] for n in names if n.startswith('stages.')]
    assert backbone == sorted(backbone)


@pytest.mark.parametrize('name', NAMES)
def test_hub_round_trip_keeps_weights_and_adapts(name, tmp_path):
    model = create(name, num_classes=5)
    save_for_hf(model, tmp_path, safe_serialization=True)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(create(f'local-dir:{tmp_path}', pretrained=True)(x), model(x))
        headless = create(f'local-dir:{tmp_path}', pretrained=True, num_classes=0)
        torch.testing.assert_close(headless(x), model.forward_head(model.forward_features(x), pre_logits=True))
    wide = create(f'local-dir:{tmp_path}', pretrained=True, in_chans=model.in_chans + 1)
    assert wide(torch.randn(2, model.in_chans + 1, *x.shape[-2:])).shape == (2, 5)


@pytest.mark.parametrize('name', NAMES)
def test_copies_by_pickle_answer_the_same(name):
    model = create(name)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize('name', NAMES)
def test_exported_program_answers_the_same(name):
    model = create(name)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('size', [(40, 56), (96, 96), (20, 23)])
@pytest.mark.parametrize('name', NAMES)
def test_other_image_sizes(name, size):
    model = create(name)
    least = model.pretrained_cfg.get('min_input_size', (0, 0, 0))[1]
    with torch.no_grad():
        logits = model(images(model, size=[max(side, least) for side in size]))
    assert logits.shape == (2, model.num_classes) and logits.isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_reset_keeps_hidden_layers_unless_told(name):
    model = create(name, num_classes=5)
    x = images(model)
    with torch.no_grad():
        before = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), before)
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(x), model.forward_features(x))
        model.reset_classifier(0, 'avg' if 'resnet' not in name else 'max')
        torch.testing.assert_close(model(x), before)
        model.reset_classifier(3, 'avg', reset_other=True)
        assert model.get_classifier().in_features == model.head_hidden_size == model.num_features
        expected = model.get_classifier()(model.forward_features(x).mean((2, 3)))
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('name', NAMES)
def test_grad_checkpointing_gives_the_same_gradients(name):
    grads = []
    for enable in (False, True):
        model = create(name).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(images(model)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for without, with_checkpointing in zip(*grads):
        torch.testing.assert_close(with_checkpointing, without)


@pytest.mark.parametrize('name', NAMES)
def test_features_only_and_intermediates_agree(name):
    net = create(name)
    features = create(name, features_only=True)
    x = images(net)
    with torch.no_grad():
        maps = features(x)
        final, taps = net.forward_intermediates(x)
        torch.testing.assert_close(final, net.forward_features(x))
    assert len(maps) == len(net.feature_info)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in net.feature_info]
    for feature_map, tap in zip(maps, taps):
        torch.testing.assert_close(feature_map, tap)


@pytest.mark.parametrize('name', NAMES)
def test_pruned_net_ends_at_the_tap_with_a_head_of_its_width(name):
    model = create(name)
    x = images(model)
    tap = len(model.feature_info) - 2
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[tap], intermediates_only=True)[0]
        model.prune_intermediate_layers([tap])
        model.reset_classifier(7, 'avg')
        assert model.head_hidden_size == model.feature_info[tap]['num_chs']
        torch.testing.assert_close(model(x), model.get_classifier()(expected.mean((2, 3))))


@pytest.mark.parametrize('kwargs', [dict(not_an_option=1), dict(head_not_an_option=1)])
def test_unknown_options_are_type_errors(kwargs):
    with pytest.raises(TypeError, match='not_an_option'):
        timm.create_model('vgg5_spinal', **kwargs)


def test_unknown_head_is_a_value_error():
    with pytest.raises(ValueError, match="Unknown head 'spinl'"):
        timm.create_model('vgg5', head='spinl')


def test_drop_rate_acts_on_the_pooled_vector():
    model = create('resnet18_cifar', drop_rate=0.99).train()
    torch.manual_seed(0)
    pooled = model.forward_head(torch.ones(1, 256, 4, 4), pre_logits=True)
    kept = pooled[pooled != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 100.))
    assert 0 < len(kept) < 26
