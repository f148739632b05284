import copy

import pytest
import torch
import torch.nn.functional as F

from timm_spinal.compare.feature_linear import FeatureLinear, count_feature_columns, skip_feature_gradients
from timm_spinal.layers import create_head

# head, options, leading feature numbers of each linear (the classifier last) for 9 features
HEADS = [
    ('linear', {}, [9]),
    ('mlp', dict(width=6), [9, 0]),
    ('spinal', dict(width=4, layers=3), [5, 5, 5, 0]),
    ('pspinal', dict(width=4, layers=2), [9, 9, 9]),
]


@pytest.mark.parametrize('name, options, expected', HEADS, ids=[h[0] for h in HEADS])
def test_feature_columns_are_those_that_no_parameter_makes(name, options, expected):
    head = create_head(name, 9, 3, **options)
    before = copy.deepcopy(head.state_dict())
    found = count_feature_columns(head, torch.randn(5, 9))
    assert list(found.values()) == expected
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


@pytest.mark.parametrize('name, options, expected', HEADS, ids=[h[0] for h in HEADS])
def test_gradients_of_the_parameters_stay_the_same(name, options, expected):
    torch.manual_seed(0)
    head = create_head(name, 9, 3, **{**options, **({} if name == 'linear' else dict(dropout=0.))})
    ours, x, y = copy.deepcopy(head), torch.randn(7, 9), torch.arange(7) % 3
    skip_feature_gradients(ours, x)
    assert isinstance(ours.fc, FeatureLinear) is bool(expected[-1])
    assert list(ours.state_dict()) == list(head.state_dict())
    losses = []
    for module in (ours, head):
        torch.manual_seed(1)  # skip dropout
        losses.append(F.cross_entropy(module(x), y))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (key, p), q in zip(ours.named_parameters(), head.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=key)
        assert q.grad.abs().max() > 0 or key.endswith('fc.bias')  # a bias in front of BatchNorm has none
