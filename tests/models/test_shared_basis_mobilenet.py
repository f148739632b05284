import pytest
import timm
import torch
from timm.models._efficientnet_blocks import InvertedResidual

from timm_spinal.layers import SharedConv2d


# docs/papers/shared_bases.md, section 6, on timm's own mobilenetv2_100
@pytest.mark.parametrize('name, options, expected', [
    ('mobilenetv2_100_sb', {}, 3_240_680),
    ('mobilenetv2_100_sbpp', {}, 2_976_488),
    ('mobilenetv2_100_sb', dict(sb_project=True, num_classes=10), 2_976_488 - 990 * 1281),
])
def test_parameter_counts(name, options, expected):
    model = timm.create_model(name, device='meta', **options)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize('name, kinds', [('mobilenetv2_100_sb', 1), ('mobilenetv2_100_sbpp', 2)])
def test_what_is_shared(name, kinds):
    """Four stages, their first blocks ordinary; expansions, and projections in the "++" form; uses 2, 3, 2, 2."""
    model = timm.create_model(name, device='meta')
    stages = model.shared_stages()
    assert list(stages) == ['blocks.2', 'blocks.3', 'blocks.4', 'blocks.5']
    for stage, chs, uses in zip(stages.values(), (32, 64, 96, 160), (2, 3, 2, 2)):
        shapes = [(6 * chs, chs, 1, 1), (chs, 6 * chs, 1, 1)][:kinds]
        assert [tuple(basis.shape) for basis in stage.bases()] == shapes
        assert type(stage[0]) is InvertedResidual
        assert sum(isinstance(m, SharedConv2d) for m in stage.modules()) == kinds * uses


def test_computes_what_an_unshared_net_of_the_same_filters_does():
    torch.manual_seed(0)
    shared = timm.create_model('mobilenetv2_100_sbpp', num_classes=5).eval()
    plain = timm.create_model('mobilenetv2_100', num_classes=5).eval()
    state = shared.state_dict()
    for i, stage in enumerate((2, 3, 4, 5)):
        basis, basis2 = state.pop(f'blocks.{stage}.basis'), state.pop(f'blocks.{stage}.basis2')
        for k in range(1, (3, 4, 3, 3)[i]):
            state.update({f'blocks.{stage}.{k}.conv_pw.weight': basis, f'blocks.{stage}.{k}.conv_pwl.weight': basis2})
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(shared(x), plain(x))


def test_orthogonality_of_the_papers_forms():
    """docs/papers/shared_bases.md, section 4: 6C x C filters cannot be orthonormal; C x 6C ones are."""
    assert timm.create_model('mobilenetv2_100_sb').orthogonality_loss().item() == pytest.approx(1.22e-3, rel=5e-3)
    assert timm.create_model('mobilenetv2_100_sbpp').orthogonality_loss().item() == pytest.approx(1.22e-3, rel=5e-3)


def test_options_of_timms_net():
    model = timm.create_model('mobilenetv2_100_sb', device='meta', bn_eps=0.01, act_layer='relu', drop_path_rate=0.2)
    assert model.blocks[3][2].bn1.eps == 0.01 and type(model.blocks[3][2].bn1.act).__name__ == 'ReLU'
    assert model.blocks[3][2].drop_path.drop_prob > 0
    with pytest.raises(TypeError):
        timm.create_model('mobilenetv2_100_sb', device='meta', sb_rank=8)


def test_features_and_pruning():
    model = timm.create_model('mobilenetv2_100_sb', features_only=True, out_indices=(2, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    assert [tuple(m.shape[1:]) for m in model(x)] == [(32, 8, 8), (96, 4, 4)]
    pruned = timm.create_model('mobilenetv2_100_sb').eval()
    expected = pruned.forward_intermediates(x, indices=[2], intermediates_only=True)
    pruned.prune_intermediate_layers([2])
    assert list(pruned.shared_stages()) == ['blocks.2']
    torch.testing.assert_close(pruned.forward_intermediates(x, indices=[2], intermediates_only=True), expected)
