import pytest
import timm
import torch

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.training.freeze import FREEZES, apply_freeze


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
