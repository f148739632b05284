import pytest
import torch
from torch import nn

from timm_spinal.layers import SharedBasisConv2d, SharedStage, orthogonality_loss


class Block(nn.Module):
    def __init__(self, channels: int, shared: int, unique: int):
        super().__init__()
        self.conv1 = SharedBasisConv2d(channels, channels, shared, unique)
        self.conv2 = SharedBasisConv2d(channels, channels, shared, unique)


def stage(channels=4, shared=6, unique=2, blocks=2, double=False, noise=0.3):
    """A stage of decomposed blocks behind an ordinary one, its filters off from orthonormal."""
    shape = (shared, channels, 3, 3) if shared else None
    made = SharedStage(
        [nn.Identity(), *(Block(channels, shared, unique) for _ in range(blocks))], shape, shape if double else None)
    with torch.no_grad():
        for basis in made.bases():
            basis.add_(noise * torch.randn(basis.shape))
    return made


def tall(noise=0.):
    """The bases of a "++" form: 3x3 filters, and 16 filters of 4 numbers."""
    made = SharedStage([nn.Identity()], (4, 4, 3, 3), (16, 4, 1, 1))
    with torch.no_grad():
        for basis in made.bases():
            basis.add_(noise * torch.randn(basis.shape))
    return made


def squared_errors(rows):
    return (rows @ rows.T - torch.eye(len(rows))).square()


def by_hand(stages, with_unique):
    """Sum and number of the entries that docs/papers/shared_bases.md, section 4 counts, entry by entry."""
    total, entries = torch.tensor(0.), 0
    for made in stages:
        shared = torch.cat(made.bases()).flatten(1)
        sites = [m.unique.flatten(1) for m in made.modules() if isinstance(m, SharedBasisConv2d)] if with_unique else []
        rows = torch.cat([shared, *sites])
        counted = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        counted[:len(shared)] = True
        start = len(shared)
        for site in sites:
            counted[start:start + len(site), start:start + len(site)] = True
            start += len(site)
        total, entries = total + squared_errors(rows)[counted].sum(), entries + int(counted.sum())
    return total, entries


@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('with_unique', [False, True])
def test_official_mode_is_one_mean_over_all_stages(double, with_unique):
    torch.manual_seed(0)
    stages = [stage(double=double), stage(8, 12, 4, double=double)]
    total, entries = by_hand(stages, with_unique)
    expected = total / entries
    loss = orthogonality_loss(stages, with_unique=with_unique)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    filters = [p for made in stages for name, p in made.named_parameters() if 'basis' in name or 'unique' in name]
    grads = torch.autograd.grad(loss, filters, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, filters, allow_unused=True)
    assert all((a is None) == (b is None) for a, b in zip(grads, expected_grads))
    torch.testing.assert_close([g for g in grads if g is not None], [g for g in expected_grads if g is not None])


def test_entries_on_cifar10_are_the_papers():
    """ResNet32-S8U1, S16U1 and S16U1*: 2,856, 8,232 and 27,048 entries (docs/papers/shared_bases.md, section 4)."""
    for shared, double, expected in ((8, False, 2856), (16, False, 8232), (16, True, 27048)):
        stages = [stage(16 * m, shared * m, m, blocks=4, double=double) for m in (1, 2, 4)]
        total, entries = by_hand(stages, with_unique=True)
        assert entries == expected
        assert orthogonality_loss(stages, with_unique=True).item() == pytest.approx(total.item() / expected, rel=1e-4)


def test_filters_of_two_sizes_are_two_means():
    torch.manual_seed(0)
    stages = [tall(0.3), tall(0.3)]
    expected = sum(
        torch.cat([squared_errors(getattr(made, name).flatten(1)).flatten() for made in stages]).mean()
        for name in ('basis', 'basis2'))
    assert orthogonality_loss(stages).item() == pytest.approx(expected.item(), rel=1e-5)


def test_least_of_more_filters_than_numbers():
    """(n - m) / n^2 in the official mode, 0 in the other (docs/papers/shared_bases.md, section 4)."""
    assert orthogonality_loss([tall()]).item() == pytest.approx((16 - 4) / 16 ** 2, rel=1e-5)
    assert orthogonality_loss([tall()], 'stage').item() == pytest.approx(0., abs=1e-10)


def test_stage_mode_adds_stages_of_any_size_alike():
    torch.manual_seed(0)
    stages = [stage(), stage(8, 12, 4)]
    expected = sum(squared_errors(made.basis.flatten(1)).sum() / len(made.basis) for made in stages)
    assert orthogonality_loss(stages, 'stage').item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('mode', ['official', 'stage'])
def test_drawn_bases_cost_nothing(mode):
    stages = [stage(noise=0.), stage(8, 12, 4, double=True, noise=0.)]
    assert orthogonality_loss(stages, mode).item() < 1e-12


@pytest.mark.parametrize('mode, diluted', [('official', True), ('stage', False)])
def test_weight_decay_against_the_penalty(mode, diluted):
    """Rows settle at a squared norm of 1 - wd N / (4 lambda), N entries or in mode stage N rows.

    See docs/papers/shared_bases.md, section 4.
    """
    torch.manual_seed(0)
    made, decay, weight = stage(8, 24, 0, noise=0.), 0.02, 10.
    optimizer = torch.optim.SGD([made.basis], lr=0.5 if diluted else 0.05, weight_decay=decay)
    for _ in range(200):
        optimizer.zero_grad()
        (weight * orthogonality_loss([made], mode)).backward()
        optimizer.step()
    expected = 1 - decay * (24 ** 2 if diluted else 24) / (4 * weight)
    assert made.basis.flatten(1).square().sum(1).mean().item() == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(0.712 if diluted else 0.988)


def test_float32_under_autocast_and_in_half_precision():
    made = stage()
    expected = orthogonality_loss([made])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(orthogonality_loss([made]), expected)
    assert orthogonality_loss([made.to(torch.bfloat16)]).dtype == torch.float32


def test_bad_input():
    with pytest.raises(ValueError, match=r"Unknown mode 'mean'.*official and stage"):
        orthogonality_loss([stage()], 'mean')
    with pytest.raises(ValueError, match='no shared filters'):
        orthogonality_loss([stage(shared=0)])
