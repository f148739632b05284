import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal.compare.joined_linear import JoinedLinear, join_linears
from timm_spinal.compare.stacked import seed_dropout
from timm_spinal.layers import create_head, dropout_kernel, sparse_product

# head, options, inputs of each linear (the classifier last)
HEADS = {
    'linear': ('linear', {}, [1]),
    'mlp': ('mlp', dict(width=6, layers=2), [1, 1, 1]),
    'spinal': ('spinal', dict(width=4, layers=3), [1, 2, 2, 3]),
    'spinal-plain': ('spinal', dict(width=4, layers=3, dropout=0., norm_layer='layernorm'), [1, 2, 2, 3]),
    'spinal-shared': ('spinal', dict(width=4, layers=4, shared=True, act_layer='gelu'), [1, 2, 2, 2, 4]),
    'pspinal': ('pspinal', dict(width=4, layers=3), [1, 2, 3, 4]),
    'pspinal-dropout': ('pspinal', dict(width=4, layers=2, dropout=0.3, norm_layer='batchnorm1d'), [1, 2, 3]),
}


def seeded(head):
    seed_dropout(head, 3)
    return head


def train_step(head, x, y):
    loss = F.cross_entropy(head(x), y)
    head.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in head.parameters():
            p -= 0.1 * p.grad
    return loss.detach()


@pytest.mark.parametrize('in_c', [True, False])
@pytest.mark.parametrize('name', HEADS)
def test_training_is_the_same(name, in_c, monkeypatch):
    if not in_c:
        monkeypatch.setattr(dropout_kernel, '_library', lambda: None)
    torch.manual_seed(0)
    kind, options, inputs = HEADS[name]
    head, x, y = seeded(create_head(kind, 9, 3, **options)), torch.randn(14, 9), torch.arange(14) % 3
    before = copy.deepcopy(head.state_dict())
    joined = join_linears(head, x)
    assert [len(n.args) for n in joined.graph.nodes if n.op == 'call_module'
            and isinstance(joined.get_submodule(n.target), JoinedLinear)] == inputs
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    for _ in range(3):
        torch.testing.assert_close(train_step(joined, x, y), train_step(head, x, y), rtol=1e-5, atol=1e-6)
    trained = joined.state_dict()
    assert set(trained) == set(before)
    for key, value in head.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-5, atol=1e-5, msg=key)
    assert not torch.allclose(trained['fc.weight'], before['fc.weight'], atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(joined.eval()(x), head.eval()(x), rtol=1e-5, atol=1e-5)
        head.load_state_dict(trained)
        torch.testing.assert_close(joined(x), head(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dropout, linears', [(0.5, 2), (0.4, 0)])
def test_products_pass_over_zeros_from_half_of_them(dropout, linears):
    torch.manual_seed(0)
    head = seeded(create_head('spinal', 100, 3, width=64, layers=2, dropout=dropout))
    x, y = torch.randn(40, 100), torch.arange(40) % 3
    joined = join_linears(head, x)
    transposed = [m for m in joined.modules() if isinstance(m, JoinedLinear) and m.weight.stride(0) == 1]
    assert len(transposed) == (linears if sparse_product.can_multiply(x, 64) else 0)
    assert all(p.is_contiguous() for p in head.parameters())
    for _ in range(3):
        torch.testing.assert_close(train_step(joined, x, y), train_step(head, x, y), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(joined.parameters(), head.parameters()):
        assert ours.grad.stride() == ours.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_features_get_a_gradient_where_they_need_one():
    torch.manual_seed(0)
    head = seeded(create_head('pspinal', 9, 3, width=4, layers=2))
    x = torch.randn(7, 9)
    joined = join_linears(head, x)
    gradients = []
    for module in (joined, head):
        features = x.clone().requires_grad_()
        module(features).square().sum().backward()
        gradients.append(features.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert gradients[1].abs().min() > 0


class Branching(nn.Sequential):
    """Another function of the data in each mode, by a branch that a trace cannot see."""

    def forward(self, x):
        x = super().forward(x)
        return F.dropout(x, 0.5) if self.training else x


class DataDependent(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class TwoWays(nn.Sequential):
    """One linear, with dropout and without."""

    def forward(self, x):
        return self[1](self[0](x)) + self[1](x)


class Tokens(nn.Sequential):
    def forward(self, x):
        return super().forward(x[:, None]).mean(dim=1)


@pytest.mark.parametrize('kind', [Branching, DataDependent, TwoWays, Tokens])
def test_other_heads_stay_as_they_are(kind):
    torch.manual_seed(0)
    head = seeded(kind(nn.Dropout(0.5), nn.Linear(9, 3)))
    before, x = str(head), torch.randn(5, 9)
    assert join_linears(head, x) is head and str(head) == before and head.training
    assert head(x).requires_grad


def test_dropout_in_front_of_something_else_stays():
    torch.manual_seed(0)
    x = torch.randn(8, 9)
    head = seeded(nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 3)))
    joined = join_linears(head, x)
    assert joined.get_submodule('2').drop is None
    assert torch.equal(joined(x), head(x))


class TwoReaders(nn.Module):
    """Two linears behind one dropout, which see the same mask."""

    def __init__(self):
        super().__init__()
        self.drop, self.first, self.second = nn.Dropout(0.5), nn.Linear(9, 3), nn.Linear(9, 3)

    def forward(self, x):
        x = self.drop(x)
        return self.first(x) - self.second(x)


def test_one_dropout_in_front_of_two_linears_draws_once():
    torch.manual_seed(0)
    x, head = torch.randn(8, 9), seeded(TwoReaders())
    joined = join_linears(head, x)
    assert isinstance(joined.first, JoinedLinear) and joined.first.drop is joined.second.drop is None
    torch.testing.assert_close(joined(x), head(x), rtol=1e-6, atol=1e-6)
