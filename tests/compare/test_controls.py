import pytest
import torch

from timm_spinal.compare.controls import (
    new_head,
    new_heads,
    parse_variants,
    size_controls,
    slug,
)
from timm_spinal.cost import count_params
from timm_spinal.errors import UserError


def names(text):
    return [variant.name for variant in parse_variants(text)]


def test_mlp_stands_for_a_control_of_each_head():
    assert names('linear,mlp,spinal,pspinal') == ['linear', 'mlp=spinal', 'mlp=pspinal', 'spinal', 'pspinal']
    assert names('linear,mlp') == ['linear', 'mlp']
    assert names('mlp,mlp=spinal,spinal') == ['mlp=spinal', 'spinal']


def test_options_after_colons():
    variant = parse_variants('spinal:width=64:norm_layer=layernorm:dropout=0.1:shared=true')[0]
    assert variant.options == dict(width=64, norm_layer='layernorm', dropout=0.1, shared=True)
    head = new_head(variant, 20, 5)
    assert head.hidden.out_features == 4 * 64


@pytest.mark.parametrize('text', ['spinal', 'pspinal', 'spinal:width=64:layers=8', 'pspinal:width=333'])
@pytest.mark.parametrize('features, classes', [(1280, 10), (101, 37)])
def test_controls_are_as_large_as_their_head(text, features, classes):
    variants = size_controls(parse_variants(f'mlp,{text}'), features, classes)
    assert variants[0].sized_as == text
    ours, head = (count_params(new_head(v, features, classes)) for v in variants)
    assert abs(ours - head) <= (features + classes + 3) / 2


def test_initial_weights_depend_on_the_seed_alone():
    variant = parse_variants('mlp:width=8')[0]
    first, second = new_heads(variant, 5, 3, [4, 9])
    torch.manual_seed(0)
    again, = new_heads(variant, 5, 3, [9])
    assert torch.equal(second.fc.weight, again.fc.weight) and not torch.equal(first.fc.weight, again.fc.weight)


@pytest.mark.parametrize('text, message', [
    ('spinall', "unknown head 'spinall'; did you mean spinal"),
    ('spinal:widht=3', "has no option 'widht'; did you mean width"),
    ('spinal:width', "'width' is not of the form option=value"),
    ('linear,linear', 'linear is given twice'),
    ('linear,mlp=spinal', 'takes its size from spinal, which is not in the list'),
    (' , ', 'no heads'),
])
def test_bad_heads(text, message):
    with pytest.raises(UserError, match=message):
        parse_variants(text)


def test_bad_values_are_found_before_training():
    with pytest.raises(UserError, match='head spinal:splits=9: layers'):
        size_controls(parse_variants('spinal:splits=9'), 20, 5)


def test_slugs_are_folder_names():
    assert slug('mlp=spinal:width=256') == 'mlp=spinal-width=256'
    assert slug('a/b c') == 'a-b-c'
