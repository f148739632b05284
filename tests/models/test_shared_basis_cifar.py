import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from timm.optim import param_groups_layer_decay

import timm_spinal
from timm_spinal.cost import count_macs
from timm_spinal.layers import SharedBasisConv2d, SharedStage
from timm_spinal.models.cifar_resnet import SmallResNet

from .official_bases import official_resnet34

# docs/papers/shared_bases.md, section 6: parameters and MACs in millions
NAMED = {
    'resnet32_sb_s8u1_cifar': (150_666, 47.6),
    'resnet32_sb_s16u1_cifar': (197_258, 79.1),
    'resnet32_sb_s16u1d_cifar': (245_642, 79.1),
    'resnet56_sb_s8u1_cifar': (201_850, 83.0),
    'resnet56_sb_s16u1_cifar': (270_842, 145.9),
    'resnet56_sb_s16u1d_cifar': (319_226, 145.9),
}
ABLATIONS = [
    ('resnet32_sb_s16u1d_cifar', dict(sb_unique=0), 218_650),
    ('resnet56_sb_s16u1d_cifar', dict(sb_unique=0), 265_242),
    ('resnet32_sb_s16u1_cifar', dict(sb_rank=0, sb_unique=16), 508_954),
    ('resnet56_sb_s16u1_cifar', dict(sb_rank=0, sb_unique=16), 942_618),
]


# docs/papers/shared_bases.md, section 6, with GMACs
CIFAR100 = [
    ('resnet18_cifar100', {}, 11_220_132, 0.555),
    ('resnet34_cifar100', {}, 21_328_292, 1.159),
    ('resnet34_sb_s8u1_cifar100', {}, 5_865_428, 0.395),
    ('resnet34_sb_s16u1_cifar100', {}, 6_485_844, 0.521),
    ('resnet34_sb_s32u1_cifar100', {}, 7_726_676, 0.773),
    ('resnet34_sb_s16u1_cifar100', dict(sb_unique=0), 6_201_508, 0.505),
    ('resnet34_sb_s32u1_cifar100', dict(sb_unique=0), 7_442_340, 0.757),
    ('resnet34_sb_s16u1_cifar100', dict(sb_rank=0, sb_unique=16), 9_510_052, 0.505),
    ('resnet34_sb_s32u1_cifar100', dict(sb_rank=0, sb_unique=32), 14_059_428, 0.757),
]


def count(name, **options):
    return sum(p.numel() for p in timm.create_model(name, device='meta', **options).parameters())


@pytest.mark.parametrize('name', NAMED)
def test_parameters_and_macs(name):
    parameters, macs = NAMED[name]
    assert count(name) == parameters
    model = timm.create_model(name, device='meta').eval()
    assert count_macs(model, torch.empty(1, 3, 32, 32, device='meta')) / 1e6 == pytest.approx(macs, abs=0.06)


@pytest.mark.parametrize('name, options, expected, gmacs', CIFAR100)
def test_cifar100(name, options, expected, gmacs):
    model = timm.create_model(name, device='meta', **options).eval()
    assert sum(p.numel() for p in model.parameters()) == expected and model.num_classes == 100
    macs = count_macs(model, torch.empty(1, 3, 32, 32, device='meta'))
    assert macs / 1e9 == pytest.approx(gmacs, abs=1e-3)


def test_cifar100_keeps_the_size_in_its_stem():
    model = timm.create_model('resnet34_sb_s8u1_cifar100', layers=(2, 2, 2, 2), features_only=True).eval()
    assert [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 32, 32))] == [
        (64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]


def test_cifar100_penalty_counts_the_shared_filters_alone_and_merges():
    torch.manual_seed(0)
    model = timm.create_model('resnet34_sb_s8u1_cifar100').eval()
    assert model.orthogonality_loss().item() < 1e-12
    plain = timm_spinal.merge_bases(model)
    again = timm.create_model('resnet34_cifar100').eval()
    again.load_state_dict(plain.state_dict())
    assert type(plain) is type(again) and plain.pretrained_cfg['architecture'] == 'resnet34_cifar100'
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    assert (again(images) - logits).abs().max() / logits.abs().max() < 1e-5


def test_cifar100_official_checkpoints_load(tmp_path):
    """The names are those of the ImageNet net; the paper's stem is a 3x3 convolution."""
    state = official_resnet34(s=8, u=1, double=False, classes=100)
    state['module.conv1.weight'] = torch.randn(64, 3, 3, 3)
    torch.save(state, tmp_path / 'official.pth')
    model = timm.create_model(
        'resnet34_sb_s8u1_cifar100', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'official.pth')))
    assert torch.equal(model.conv1.weight, state['module.conv1.weight'])
    assert torch.equal(model.layer4.basis, state['module.shared_basis_4.weight'])


@pytest.mark.parametrize('name, options, expected', ABLATIONS)
def test_ablations(name, options, expected):
    assert count(name, **options) == expected


def test_every_name_is_listed_and_the_first_blocks_are_timms():
    assert set(timm_spinal.list_models('resnet?*_sb_*_cifar')) == set(NAMED)
    model = timm.create_model('resnet32_sb_s16u1_cifar', device='meta')
    assert list(model.shared_stages()) == ['stages.1', 'stages.2', 'stages.3']
    for stage in model.shared_stages().values():
        assert isinstance(stage, SharedStage) and type(stage[0]) is BasicBlock and len(stage) == 5
        # uses, docs/papers/shared_bases.md, section 3
        assert sum(isinstance(m, SharedBasisConv2d) for m in stage.modules()) == 8
    assert [len(stage.basis) for stage in model.shared_stages().values()] == [16, 32, 64]


def test_penalty_counts_the_unique_filters():
    """docs/papers/shared_bases.md, section 4: 8,232 entries, and the unique filters are not drawn orthonormal."""
    torch.manual_seed(0)
    model = timm.create_model('resnet32_sb_s16u1_cifar')
    total = 0.
    for stage in model.shared_stages().values():
        rows = stage.basis.flatten(1)
        for conv in (m for m in stage.modules() if isinstance(m, SharedBasisConv2d)):
            own = conv.unique.flatten(1)
            total += (rows @ own.T).square().sum() + (own @ own.T - torch.eye(len(own))).square().sum()
    assert model.orthogonality_loss().item() == pytest.approx(total.item() / 8232, rel=1e-4) and total > 8232


def test_merged_is_resnet32_cifar():
    torch.manual_seed(0)
    model = timm.create_model('resnet32_sb_s16u1d_cifar').train()
    images = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        model(images)
    model.eval()
    plain = timm_spinal.merge_bases(model)
    again = timm.create_model('resnet32_cifar').eval()
    again.load_state_dict(plain.state_dict())
    assert type(plain) is SmallResNet and plain.pretrained_cfg['architecture'] == 'resnet32_cifar'
    logits = model(images)
    for other in (plain, again, timm_spinal.fold_bases(model)):
        assert (other(images) - logits).abs().max() / logits.abs().max() < 1e-5


def official_names(model):
    """Our state dict as the paper's code would name it: He's names, a basis again under every block, two parts."""
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (
                ('stages.0.conv.', 'conv1.'), ('stages.0.bn.', 'bn1.'), ('head.fc.', 'linear.'), ('stages.', 'layer'),
                ('conv1.unique', 'basis_conv1.weight'), ('conv2.unique', 'basis_conv2.weight'),
                ('conv1.coeff', 'coeff_conv1.weight'), ('conv2.coeff', 'coeff_conv2.weight'),
                ('conv1.basis_norm', 'basis_bn1'), ('conv2.basis_norm', 'basis_bn2'),
                ('conv1.norm', 'bn1'), ('conv2.norm', 'bn2')):
            name = name.replace(ours, theirs)
        if name.endswith('.basis'):
            stage = name[len('layer'):-len('.basis')]
            for block in range(1, 5):
                state[f'layer{stage}.{block}.shared_basis.weight'] = value
            name = f'shared_basis_{stage}.weight'
        state[name] = value
    return state


def test_official_checkpoints_load(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('resnet32_sb_s16u1_cifar').eval()
    state = official_names(model)
    assert {'conv1.weight', 'linear.bias', 'layer3.4.shared_basis.weight', 'layer2.1.bn2.weight'} <= set(state)
    assert not any('stages' in name or 'unique' in name for name in state)
    torch.save(state, tmp_path / 'official.pth')
    loaded = timm.create_model(
        'resnet32_sb_s16u1_cifar', pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'official.pth'))).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    del state['layer3.4.coeff_conv2.weight']
    torch.save(state, tmp_path / 'short.pth')
    with pytest.raises(RuntimeError, match='stages.3.4.conv2.coeff'):
        timm.create_model(
            'resnet32_sb_s16u1_cifar', pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'short.pth')))


def test_features_and_layer_decay():
    model = timm.create_model('resnet32_sb_s16u1_cifar', features_only=True).eval()
    assert [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 32, 32))] == [
        (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    model = timm.create_model('resnet32_sb_s16u1_cifar')
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    for stage in model.shared_stages().values():
        assert scale[id(stage.basis)] == scale[id(next(stage[1].parameters()))] < 1.


@pytest.mark.parametrize('options, message', [
    (dict(sb_rank=0, sb_unique=0), r'\(S0\) and without unique filters \(U0\)'),
    (dict(sb_rank=144), '144 shared and 1 unique filters are more than the 144'),
    (dict(sb_stages='4'), "sb_stages '4' must be digits of stages, such as '123'"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('resnet32_sb_s16u1_cifar', device='meta', **options)
