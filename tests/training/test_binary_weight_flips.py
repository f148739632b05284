from dataclasses import replace

import pytest
import timm
import torch
from accelerate.utils import set_seed

import timm_spinal
from timm_spinal.training.model import binary_signs, binary_weight_flips
from timm_spinal.training.train import train

from .runs import last_state, resumed, small_config


def capsule_model(head='xnodr'):
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', num_classes=0)
    return timm_spinal.attach_head(model, head, num_classes=4, head_capsules=8)


def test_only_the_weights_that_are_binarised_count():
    model = capsule_model()
    assert len(binary_signs(model)) == 8 * 4 * 8 * 16
    with torch.no_grad():
        model.attached_head.hidden.block.conv_pw.weight.neg_()
    before = binary_signs(model)
    assert binary_weight_flips(before, model) == 0.
    with torch.no_grad():
        model.attached_head.fc.weight[0, :, 0].neg_()  # 4 x 16 of them
    assert binary_weight_flips(before, model) == 100 / 64
    for head in ('caps', 'xnidr'):
        plain = capsule_model(head)
        assert len(binary_signs(plain)) == 0 and binary_weight_flips(binary_signs(plain), plain) is None


def test_zero_counts_as_negative():
    model = capsule_model()
    weight = model.attached_head.fc.weight
    with torch.no_grad():
        weight.fill_(0.)
        before = binary_signs(model)
        assert not before.any()
        weight.fill_(-1.)
        assert binary_weight_flips(before, model) == 0.
        weight.fill_(1.)
    assert binary_weight_flips(before, model) == 100.


@pytest.mark.slow
def test_result_counts_from_the_first_update_to_the_last(tmp_path):
    config = small_config(
        tmp_path, model='test_efficientnet_xnodr', model_kwargs=dict(head_capsules=8), loss='margin', smoothing=0.,
        opt='adam', lr=0.01, epochs=2, model_ema=True)
    result = train(config)
    set_seed(config.seed)
    timm_spinal.ensure_registered(config.model)
    first = timm.create_model(config.model, num_classes=2, **config.model_kwargs).attached_head.fc.weight
    last = last_state(config)['model.attached_head.fc.weight']
    expected = 100 * ((first > 0) != (last > 0)).double().mean().item()
    assert result['sign_flips'] == expected and 0 < expected < 60 and result['xnor'] == 'torch'

    parts = replace(config, experiment='parts')
    train(replace(parts, stop_epoch=1))
    assert train(resumed(parts))['sign_flips'] == expected


@pytest.mark.slow
def test_a_frozen_head_changes_no_sign_and_others_have_none(tmp_path):
    options = dict(model_kwargs=dict(head_capsules=8), loss='margin', epochs=1)
    frozen = small_config(
        tmp_path, model='test_efficientnet_xnodr', freeze_modules=['attached_head.fc'], experiment='a', **options)
    assert train(frozen)['sign_flips'] == 0.
    float_one = small_config(tmp_path, model='test_efficientnet_caps', experiment='b', **options)
    result = train(float_one)
    assert result['sign_flips'] is None and 'xnor' not in result
