import copy

import pytest
import torch
from torch import nn

from timm_spinal.layers import SharedStage


class Block(nn.Module):
    """x + scale * conv(x, basis) + conv(x, basis2)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor, basis: torch.Tensor, basis2: torch.Tensor) -> torch.Tensor:
        conv = nn.functional.conv2d
        return x + self.scale * conv(x, basis, padding=1) + conv(x, basis2, padding=1)


def stage(double=False, channels=4):
    torch.manual_seed(0)
    shape = (channels, channels, 3, 3)
    blocks = [nn.Conv2d(3, channels, 1), Block(0.5), Block(-2.)]
    return SharedStage(blocks, shape, shape if double else None)


def gram(*bases):
    rows = torch.cat(bases).flatten(1)
    return rows @ rows.T


@pytest.mark.parametrize('double', [False, True])
def test_every_tensor_has_one_name(double):
    names = ['basis', 'basis2'] if double else ['basis']
    made = stage(double)
    blocks = ['0.weight', '0.bias', '1.scale', '2.scale']
    assert sorted(made.state_dict()) == sorted(names + blocks)
    assert sorted(n for n, _ in made.named_parameters(remove_duplicate=False)) == sorted(names + blocks)
    assert made.basis_names() == names and len(made) == 3 and made[-1] is made.get_submodule('2')


@pytest.mark.parametrize('double', [False, True])
def test_forward_hands_the_bases_to_all_but_the_first(double):
    made, x = stage(double), torch.randn(2, 3, 5, 5)
    basis2 = made.basis2 if double else made.basis
    y = made[0](x)
    for block in (made[1], made[2]):
        y = block(y, made.basis, basis2)
    assert torch.equal(made(x), y)
    steps = x
    for step in made:
        steps = step(steps)
    assert torch.equal(steps, y)
    torch.testing.assert_close(torch.jit.script(made)(x), y)
    torch.testing.assert_close(torch.fx.symbolic_trace(made)(x), y)


def test_every_use_adds_to_the_gradient():
    made = stage()
    x = torch.randn(2, 3, 5, 5)
    made(x).square().sum().backward()
    twin = copy.deepcopy(made)
    once, again = (made.basis.detach().clone().requires_grad_() for _ in range(2))
    y = twin[2](twin[1](twin[0](x), once, once), again, again)
    y.square().sum().backward()
    torch.testing.assert_close(made.basis.grad, once.grad + again.grad)


def test_bases_are_drawn_orthonormal_and_to_each_other():
    one, two = stage(), stage(double=True)
    torch.testing.assert_close(gram(one.basis), torch.eye(4))
    torch.testing.assert_close(gram(two.basis, two.basis2), torch.eye(8))
    torch.testing.assert_close(gram(*two.to(memory_format=torch.channels_last).bases()), torch.eye(8))


def test_more_filters_than_numbers_get_orthonormal_columns():
    made = SharedStage([nn.Identity()], (4, 4, 3, 3), (16, 4, 1, 1))
    columns = made.basis2.flatten(1)
    torch.testing.assert_close(columns.T @ columns, torch.eye(4))
    torch.testing.assert_close(gram(made.basis), torch.eye(4))


def test_reset_draws_anew_where_the_tensors_lie():
    made = stage(double=True).to(torch.float64, memory_format=torch.channels_last)
    before = made.basis.detach().clone()
    made.reset_parameters()
    assert made.basis.dtype == torch.float64 and not torch.equal(made.basis, before)
    torch.testing.assert_close(gram(*made.bases()), torch.eye(8, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    half = SharedStage([nn.Identity()], (4, 4, 3, 3), dtype=torch.bfloat16)
    torch.testing.assert_close(gram(half.basis.float()), torch.eye(4), rtol=0., atol=0.02)
    assert SharedStage([nn.Identity()], (4, 4, 3, 3), device='meta').basis.is_meta


def test_without_shared_filters():
    made = SharedStage([nn.Identity(), nn.Identity()], None)
    assert made.bases() == [] and made.basis_names() == [] and made.basis is None
