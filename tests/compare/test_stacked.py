import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal.compare.stacked import SeparateHeads, StackedHeads, can_stack, draw_masks, seed_dropout
from timm_spinal.layers import create_head

SEEDS = [3, 5, 8]
HEADS = {
    'linear': {},
    'mlp': dict(width=6),
    'spinal': dict(width=5, dropout=0.4),
    'spinal-layernorm': dict(width=5, norm_layer='layernorm'),
    'spinal-shared': dict(width=4, layers=3, shared=True),
    'pspinal': dict(width=4, dropout=0.3, norm_layer='batchnorm1d'),
}


def make_heads(name):
    torch.manual_seed(0)
    return [create_head(name.split('-')[0], 9, 4, **HEADS[name]) for _ in SEEDS]


def train(group, steps=4):
    optimizer = torch.optim.SGD([p for p, _ in group.parameters()], lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(len(SEEDS), 12, 9), torch.randint(4, (len(SEEDS), 12))
        output = group.forward_train(x)
        optimizer.zero_grad()
        (F.cross_entropy(output.flatten(0, 1), y.flatten()) * len(SEEDS)).backward()
        optimizer.step()


@pytest.mark.parametrize('name', HEADS)
def test_stacked_training_equals_separate_training(name):
    heads = make_heads(name)
    start = [{n: v.clone() for n, v in head.state_dict().items()} for head in heads]
    stacked, separate = StackedHeads(copy.deepcopy(heads), SEEDS), SeparateHeads(copy.deepcopy(heads), SEEDS)
    train(stacked)
    train(separate)
    for ours, theirs, before in zip(stacked.states(), separate.states(), start):
        assert set(ours) == set(theirs) == set(before)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(theirs['fc.weight'], before['fc.weight'], atol=1e-2)
    x = torch.randn(7, 9)
    torch.testing.assert_close(stacked.forward_eval(x), separate.forward_eval(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', HEADS)
def test_papers_heads_can_be_stacked(name):
    heads = make_heads(name)
    before = copy.deepcopy(heads[0].state_dict())
    assert can_stack(heads, SEEDS, torch.randn(len(SEEDS), 12, 9))
    assert all(torch.equal(value, before[key]) for key, value in heads[0].state_dict().items())


class OwnNoise(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class DataDependent(nn.Linear):
    def forward(self, x):
        return super().forward(x) if float(x.sum().item()) > 0 else super().forward(-x)


@pytest.mark.parametrize('kind', [OwnNoise, DataDependent])
def test_heads_that_cannot_be_stacked_are_found_out(kind):
    assert not can_stack([kind(9, 4) for _ in SEEDS], SEEDS, torch.randn(len(SEEDS), 12, 9))


def test_weight_decay_is_for_matrices_only():
    head = create_head('mlp', 9, 4, width=6)
    matrices = [tuple(p.shape) for p, decays in SeparateHeads([copy.deepcopy(head)], [0]).parameters() if decays]
    assert matrices == [(6, 9), (4, 6)]
    stacked = StackedHeads([copy.deepcopy(head), copy.deepcopy(head)], [0, 1])
    assert [tuple(p.shape) for p, decays in stacked.parameters() if decays] == [(2, 9, 6), (2, 6, 4)]


@pytest.mark.parametrize('p', [0.3, 0.5])
def test_masks_keep_the_mean_and_differ_by_seed(p):
    generators = [seed_dropout(nn.Sequential(), seed) for seed in (0, 1)]
    masks = draw_masks(p, (100, 100), generators)
    assert masks.unique().tolist() == pytest.approx([0., 1 / (1 - p)])
    assert masks.mean().item() == pytest.approx(1., abs=0.02)
    assert not torch.equal(masks[0], masks[1])
    again = draw_masks(p, (100, 100), [seed_dropout(nn.Sequential(), 1)])
    assert torch.equal(again[0], masks[1])
