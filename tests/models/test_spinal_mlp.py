import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spinal.models.spinal_mlp  # noqa: F401

# docs/papers/spinalnet.md, section 3.5, and docs/papers/progressive_spinalnet.md, section 3; the control is ours.
COUNTS = [
    ('spinal_mlp', 514_218),
    ('spinal_mlp_plain', 514_419),
    ('spinal_regression', 14_301),
    ('spinal_regression_plain', 22_001),
]


@pytest.mark.parametrize('name,expected', COUNTS)
def test_parameter_counts(name, expected):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == expected


def linear(state, prefix, x):
    return F.linear(x, state[f'{prefix}.weight'], state[f'{prefix}.bias'])


def test_control_has_the_nearest_width_of_equal_depth():
    def size(width):
        model = timm.create_model('spinal_mlp_plain', device='meta', widths=(width,) * 4)
        return sum(p.numel() for p in model.parameters())

    assert min(range(298, 305), key=lambda width: abs(size(width) - 514_218)) == 301


def test_progressive_net_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('spinal_mlp').eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.)
    state, x = model.state_dict(), torch.randn(4, 1, 28, 28)
    z = x.flatten(1)
    for block in ('first', 'blocks.0', 'blocks.1', 'blocks.2'):
        prefix = f'stages.1.block.{block}'
        h = linear(state, f'{prefix}.fc', z)
        norm = [state[f'{prefix}.norm.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
        z = torch.cat([z, F.relu(F.batch_norm(h, *norm))], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), linear(state, 'head.fc', z))
        assert model.forward_features(x).shape == (4, 784 + 4 * 128, 1, 1)


def test_one_skip_mask_of_rate_20_percent_in_training():
    torch.manual_seed(0)
    model = timm.create_model('spinal_mlp').train()
    z = model.forward_features(torch.ones(64, 1, 28, 28)).flatten(1)[:, :784]
    assert torch.all((z == 0) | (z == 1.25))
    assert (z == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)


def test_two_group_net_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('spinal_regression').eval()
    state, x = model.state_dict(), torch.randn(6, 8)
    h = []
    for i in range(6):
        block = 'first' if i == 0 else f'blocks.{i - 1}'
        group = x[:, :4] if i % 2 == 0 else x[:, 4:]
        z = torch.cat([group, h[-1]], 1) if h else group
        h.append(F.leaky_relu(linear(state, f'stages.1.block.{block}.fc', z), 0.01))
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :, None, None]), linear(state, 'head.fc', torch.cat(h, 1)))


def test_plain_regression_net_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('spinal_regression_plain').eval()
    state, x = model.state_dict(), torch.randn(6, 8)
    z = F.leaky_relu(linear(state, 'stages.0.1.block.fc', x), 0.01)
    z = F.leaky_relu(linear(state, 'stages.2.block.fc', z), 0.01)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :, None, None]), linear(state, 'head.fc', z))


def test_regression_learns_the_sum():
    torch.manual_seed(0)
    model = timm.create_model('spinal_regression').train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(256, 8)
    y = x.sum(1, keepdim=True)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[:, :, None, None]), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * y.var().item()


def test_number_of_inputs_is_in_chans():
    model = timm.create_model('spinal_regression', in_chans=13, num_classes=2)
    assert model(torch.randn(3, 13, 1, 1)).shape == (3, 2)
    assert model.stages[1].block.first.fc.in_features == 7


@pytest.mark.parametrize('shared', [False, True])
def test_pruning_keeps_only_the_layers_of_the_tap(shared):
    torch.manual_seed(0)
    model = timm.create_model('spinal_regression', head_shared=shared).eval()
    x = torch.randn(2, 8, 1, 1)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        model.prune_intermediate_layers([2])
        torch.testing.assert_close(model.forward_features(x), expected)
    assert expected.shape == (2, 150, 1, 1)
    assert len(model.stages[1].block.blocks) == (1 if shared else 2)


def test_state_dict_keys_are_stable():
    blocks = ['first', *(f'blocks.{i}' for i in range(5))]
    expected = [f'stages.1.block.{block}.fc.{k}' for block in blocks for k in ('weight', 'bias')]
    assert list(timm.create_model('spinal_regression').state_dict()) == [*expected, 'head.fc.weight', 'head.fc.bias']
    expected = [f'stages.{i}.fc.{k}' for i in ('0.1.block', '2.block') for k in ('weight', 'bias')]
    assert list(timm.create_model('spinal_regression_plain').state_dict()) == [
        *expected, 'head.fc.weight', 'head.fc.bias']
