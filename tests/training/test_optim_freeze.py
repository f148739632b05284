from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.training.checkpoint import find_checkpoints
from timm_spinal.training.optim import FREEZES, apply_freeze, head_first
from timm_spinal.training.train import train

from .runs import RANDOM, assert_same_state, command, resumed, small_config, train_until


def trained_names(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def plain():
    return timm.create_model('test_efficientnet', num_classes=3)


def headed():
    return timm_spinal.attach_head(plain(), 'spinal', head_width=8)


def norm_names(model, prefix=''):
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return {f'{n}.{k}' for n in norms for k in ('weight', 'bias')}


def test_none():
    model = plain()
    assert apply_freeze(model, 'none') == []
    assert trained_names(model) == {n for n, _ in model.named_parameters()}


def test_backbone_of_a_plain_model():
    model = plain()
    kept = apply_freeze(model, 'backbone')
    assert trained_names(model) == {'classifier.weight', 'classifier.bias'}
    assert len(kept) == len(norm_names(model)) // 2


def test_backbone_of_a_model_with_a_head():
    model = headed()
    kept = apply_freeze(model, 'backbone')
    assert trained_names(model) == {n for n, _ in model.named_parameters() if n.startswith('attached_head.')}
    assert not {id(m) for m in kept} & {id(m) for m in model.attached_head.modules()}


def test_backbone_of_a_small_net():
    model = timm.create_model('vgg5_spinal')
    apply_freeze(model, 'backbone')
    assert trained_names(model) == {n for n, _ in model.named_parameters() if n.startswith('head.')}
    assert any('hidden' in n for n in trained_names(model))


def test_bn_leaves_the_norm_of_the_head():
    model = headed()
    head_norms = {n for n in norm_names(model) if n.startswith('attached_head.')}
    kept = apply_freeze(model, 'bn')
    assert head_norms and head_norms <= trained_names(model)
    assert {n for n, _ in model.named_parameters()} - trained_names(model) == norm_names(model) - head_norms
    assert len(kept) == len(norm_names(model) - head_norms) // 2


def test_backbone_except_bn():
    model = headed()
    assert apply_freeze(model, 'backbone-except-bn') == []
    head = {n for n, _ in model.named_parameters() if n.startswith('attached_head.')}
    assert trained_names(model) == head | norm_names(model)


def test_frozen_statistics_stay():
    model = headed()
    kept = apply_freeze(model, 'backbone')
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    for module in kept:
        module.eval()
    model(torch.randn(4, 3, 32, 32))
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert changed and all(n.startswith('attached_head.') for n in changed)


@pytest.mark.parametrize('name', [n for n, f in FREEZES.items() if f.weights and f.batch_norm])
def test_nothing_left_to_train(name):
    with pytest.raises(UserError, match='nothing is left to train'):
        apply_freeze(timm.create_model('test_efficientnet', num_classes=0), name)


@pytest.mark.parametrize('name, modules, count', [
    ('mobilenetv2_100_xnodr', ['blocks.6.0.conv_pwl', 'blocks.6.0.bn3', 'conv_head', 'bn2'], 2_994_864),
    ('mobilenetv2_100_xnidr', ['blocks.6.0.conv_pwl', 'blocks.6.0.bn3', 'conv_head', 'bn2'], 2_994_864),
    ('resnet50_xnodr', ['layer4.2'], 23_838_832),
])
def test_modules_by_name_give_the_capsule_papers_trainable_counts(name, modules, count):
    """See docs/papers/xnodr_xnidr.md, section 4."""
    model = timm.create_model(name, num_classes=10, device='meta')
    kept = apply_freeze(model, 'none', modules)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    norms = {n for n, m in model.named_modules() if any(m is k for k in kept)}
    inside = {'layer4.2': ['layer4.2.bn1', 'layer4.2.bn2', 'layer4.2.bn3']}
    assert norms == {n for module in modules for n in inside.get(module, [module]) if 'bn' in n}


def test_modules_by_name_add_to_the_rest():
    model = plain()
    kept = apply_freeze(model, 'bn', ['conv_stem', 'bn1'])
    assert not trained_names(model) & ({'conv_stem.weight'} | norm_names(model))
    assert len(kept) == len({id(m) for m in kept}) == len(norm_names(model)) // 2


@pytest.mark.parametrize('modules, message', [
    (['conv_stm'], "no module 'conv_stm'; did you mean conv_stem"),
    ([''], 'freeze-modules : nothing is left to train; name fewer'),
])
def test_modules_by_name_that_cannot_be(modules, message):
    with pytest.raises(UserError, match=message):
        apply_freeze(plain(), 'none', modules)


# the head of test_efficientnet_spinal, weights and statistics, is the only part with this name
HEAD = 'attached_head.'
HEAD_FIRST = dict(model='test_efficientnet_spinal', model_kwargs=dict(head_width=8), freeze_epochs=1)


def changed(config, first, second):
    """Tensors of the model that differ between two checkpoints, by whether they are of the head."""
    one, two = (load_file(f'{config.output}/{config.experiment}/last/step-{n:08}/model.safetensors')
                for n in (first, second))
    names = {k for k in one if not torch.equal(one[k], two[k])}
    return {k for k in names if HEAD in k}, {k for k in names if HEAD not in k}


@pytest.mark.parametrize('options', [
    dict(opt='adamw', weight_decay=0.1), dict(opt='momentum', weight_decay=0.1, grad_accum_steps=2, clip_grad=1.)])
def test_head_trains_alone_at_first(tmp_path, options):
    """No weight, and no statistic of a BatchNorm layer, of the backbone changes before its time."""
    config = small_config(tmp_path, checkpoint_steps=1, checkpoint_hist=99, **HEAD_FIRST, **options)
    updates = train(config)['updates'] // 3
    head, backbone = changed(config, 1, updates)
    assert head and not backbone
    head, backbone = changed(config, updates, updates + 1)
    trained = {n for n, p in timm.create_model('test_efficientnet').named_parameters() if 'classifier' not in n}
    assert head and backbone >= trained and any('running_var' in k for k in backbone)


@pytest.mark.slow
def test_head_first_goes_on_to_the_bit(tmp_path, monkeypatch):
    whole = small_config(tmp_path, experiment='whole', **{**RANDOM, **HEAD_FIRST})
    train(whole)
    for update in (2, 3, 4):  # within the first epoch, at its last update, after it
        broken = replace(whole, experiment=f'broken{update}')
        train_until(monkeypatch, broken, update, RuntimeError('killed'))
        train(resumed(broken))
        assert_same_state(whole, broken)


@pytest.mark.slow
def test_head_first_in_two_processes(tmp_path, launch):
    """Its second process takes the other half of the images; the backbone waits there too."""
    config = small_config(tmp_path, batch_size=2, checkpoint_steps=1, checkpoint_hist=99, epochs=2, **HEAD_FIRST)
    launch(2, *command(config)[1:])
    assert len(find_checkpoints(tmp_path / 'run' / 'last')) == 10
    head, backbone = changed(config, 1, 5)
    assert head and not backbone
    head, backbone = changed(config, 5, 6)
    assert head and 'conv_stem.weight' in backbone


def test_weights_that_never_train_stay_so_after_the_head(tmp_path):
    config = small_config(
        tmp_path, checkpoint_steps=1, checkpoint_hist=99, epochs=2, **HEAD_FIRST, freeze_modules=['conv_stem', 'bn1'])
    train(config)
    head, backbone = changed(config, 1, 10)
    assert head and backbone and not {k for k in backbone if k.startswith(('conv_stem', 'bn1'))}


def test_head_first_needs_a_head():
    with pytest.raises(UserError, match='--freeze-epochs: the model has no classifier that trains; leave it out'):
        head_first(timm.create_model('test_efficientnet', num_classes=0), 1)
    assert head_first(timm.create_model('test_efficientnet', num_classes=0), 0).weights == []
