import copy
import pickle

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_spinal
from timm_spinal.layers import SharedBasisConv2d, SharedConv2d, SharedStage
from timm_spinal.models._shared_model import checkpoint_filter_fn

from .official_bases import official_logits, official_resnet34

# docs/papers/shared_bases.md, section 6, and the shared-only and non-shared forms of CIFAR-100 moved to ImageNet's stem
# and classifier
COUNTS = [
    ('resnet18_sb_s32u1', {}, 7_448_292),
    ('resnet18_sb_s32u1', dict(sb_rank=16), 6_489_892),
    ('resnet18_sb_s32u1', dict(sb_rank=48, sb_double=True), 10_756_772),
    ('resnet34_sb_s32u1', {}, 8_196_056),
    ('resnet34_sb_s48u1', {}, 9_436_888),
    ('resnet34_sb_s32u1d', {}, 9_762_776),
    ('resnet34_sb_s48u1d', {}, 11_786_968),
    ('resnet34_sb_s48u1', dict(sb_rank=16), 6_955_224),
    ('resnet34_sb_s48u1', dict(sb_rank=64, sb_double=True), 13_811_160),
    ('resnet34_sb_s48u1', dict(sb_rank=32, sb_unique=0), 7_442_340 + 900 * 513 + 64 * 3 * 40),
    ('resnet34_sb_s48u1', dict(sb_rank=0, sb_unique=32), 14_059_428 + 900 * 513 + 64 * 3 * 40),
    ('resnet34_sb_s32u1', dict(sb_stages='34'), None),
    ('resnet50_sb', {}, 20_506_664),
    ('resnet50_sbpp', {}, 18_262_056),
    ('resnet101_sb', {}, 29_471_784),
    ('resnet101_sbpp', {}, 22_770_728),
]


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return timm.create_model('resnet18_sb_s32u1', num_classes=5).eval()


def closed_form(layers, s, u, bases, classes=1000):
    """See docs/papers/shared_bases.md, section 6."""
    total, before = 3 * 64 * 49 + 128 + 513 * classes, 64
    for width, depth in zip((64, 128, 256, 512), layers):
        m = width // 64
        total += 9 * before * width + 9 * width ** 2 + 4 * width + bases * 9 * width * s * m
        total += (before * width + 2 * width) if before != width else 0
        rank = (s + u) * m
        total += (depth - 1) * 2 * (9 * width * u * m + rank * width + 2 * rank + 2 * width)
        before = width
    return total


@pytest.mark.parametrize('name, options, expected', COUNTS)
def test_parameter_counts(name, options, expected):
    model = timm.create_model(name, device='meta', **options)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.state_dict(keep_vars=True).values() if isinstance(p, nn.Parameter)) == count
    if expected is not None:
        assert count == expected


@pytest.mark.parametrize('s, u, double', [(8, 3, False), (40, 2, True), (16, 0, False), (0, 16, False)])
def test_counts_follow_the_closed_form(s, u, double):
    model = timm.create_model('resnet34_sb_s48u1', device='meta', sb_rank=s, sb_unique=u, sb_double=double)
    assert sum(p.numel() for p in model.parameters()) == closed_form((3, 4, 6, 3), s, u, 2 if double else 1)


@pytest.mark.parametrize('name, uses', [
    ('resnet34_sb_s48u1', [[4], [6], [10], [4]]),
    ('resnet34_sb_s48u1d', [[2, 2], [3, 3], [5, 5], [2, 2]]),
    ('resnet50_sb', [[2], [3], [5], [2]]),
    ('resnet101_sbpp', [[2, 2], [3, 3], [22, 22], [2, 2]]),
])
def test_uses_of_every_basis(name, uses):
    """Counted in a forward, by the identity of the tensor that a convolution is called with.

    See docs/papers/shared_bases.md, section 3.
    """
    model = timm.create_model(name, device='meta').eval()
    counts = {id(basis): 0 for stage in model.shared_stages().values() for basis in stage.bases()}

    def count(module, args):
        counts[id(args[1])] += 1

    for module in model.modules():
        if isinstance(module, (SharedBasisConv2d, SharedConv2d)):
            module.register_forward_pre_hook(count)
    model(torch.zeros(1, 3, 64, 64, device='meta'))
    got = [[counts[id(basis)] for basis in stage.bases()] for stage in model.shared_stages().values()]
    assert got == uses


@pytest.mark.parametrize('name, options, gmacs', [
    ('resnet34_sb_s32u1', {}, 2.479),
    ('resnet34_sb_s48u1d', {}, 3.250),
    ('resnet34_sb_s48u1', dict(sb_rank=16), 1.708),
    ('resnet50_sbpp', {}, 4.089),
])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_multiply_accumulates(name, options, gmacs, mode):
    """See docs/papers/shared_bases.md, section 6, as torch counts them, with gradients and without."""
    model = timm.create_model(name, device='meta', **options).eval()
    with mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=6e-4)


def test_first_blocks_are_timms():
    for name, block in (('resnet34_sb_s48u1', BasicBlock), ('resnet50_sbpp', Bottleneck)):
        model = timm.create_model(name, device='meta')
        assert list(model.shared_stages()) == ['layer1', 'layer2', 'layer3', 'layer4']
        for stage in model.shared_stages().values():
            assert type(stage[0]) is block and not any(isinstance(m, SharedBasisConv2d) for m in stage[0].modules())
            assert all(type(other) is not block for other in list(stage.children())[1:])


def test_stages_that_are_left_alone():
    model = timm.create_model('resnet34_sb_s32u1', device='meta', sb_stages='34')
    assert list(model.shared_stages()) == ['layer3', 'layer4'] and isinstance(model.layer1, nn.Sequential)
    plain = timm.create_model('resnet34', device='meta').state_dict()
    assert {n for n in model.state_dict() if n < 'layer3'} == {n for n in plain if n < 'layer3'}


@pytest.mark.parametrize('double', [False, True])
def test_official_checkpoints_load(double, tmp_path):
    """Strictly, from a file as ``pretrained_path`` gives it, and the model then computes what the paper's does."""
    state = official_resnet34(s=4, u=1, double=double)
    assert sum('shared_basis' in name for name in state) == 16 * (2 if double else 1)
    torch.save(state, tmp_path / 'official.pth')
    model = timm.create_model(
        'resnet34_sb_s48u1', pretrained=True, num_classes=10, sb_rank=4, sb_double=double,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'official.pth'), num_classes=10)).eval().double()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    expected = official_logits({name: value.double() for name, value in state.items()}, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_checkpoint_filter(small):
    state = official_resnet34(s=4, u=1, double=False)
    converted = checkpoint_filter_fn(state, small)
    bases = {f'layer{g}.basis' for g in (1, 2, 3, 4)}
    assert {name for name in converted if 'basis' in name and 'norm' not in name} == bases
    assert 'layer2.0.downsample.0.weight' in converted and 'layer2.1.conv1.unique' in converted
    own = small.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in checkpoint_filter_fn(own, small).items())
    state['module.layer2.3.shared_basis.weight'] = state['module.layer2.3.shared_basis.weight'] + 1
    with pytest.raises(ValueError, match="'layer2.3.shared_basis.weight' differs from its 'shared_basis_2.weight'"):
        checkpoint_filter_fn(state, small)


def test_bases_are_penalised_from_orthonormal():
    """See docs/papers/shared_bases.md, section 4: 0 as drawn, 5.17e-4 for Shared++."""
    for name, floor in (('resnet18_sb_s32u1', 0.), ('resnet50_sbpp', 5.17e-4)):
        model = timm.create_model(name)
        assert model.orthogonality_loss().item() == pytest.approx(floor, rel=1e-3, abs=1e-12)


def test_init_weights_draws_all_anew(small):
    model = copy.deepcopy(small)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    model.init_weights()
    convs = [p for p in model.parameters() if p.ndim == 4]
    assert all(p.std() > 0 for p in convs) and model.orthogonality_loss().item() < 1e-12
    # no zero-gamma (docs/papers/shared_bases.md, section 3): a residual branch answers from the start
    assert timm.create_model('resnet34_sb_s32u1', device='cpu').layer1[1].conv2.norm.weight.eq(1).all()


def test_weight_decay_of_the_bases_is_an_option(small):
    assert small.no_weight_decay() == set()
    model = timm.create_model('resnet34_sb_s48u1d', device='meta', sb_decay=False)
    names = {f'layer{g}.{basis}' for g in (1, 2, 3, 4) for basis in ('basis', 'basis2')}
    assert model.no_weight_decay() == names
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    free = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    assert all(id(model.get_parameter(name)) in free for name in names)


@pytest.mark.parametrize('name', ['resnet18_sb_s32u1', 'resnet18_sb_s32u1d', 'resnet18_sbpp'])
def test_checkpointing_along_the_stages(name):
    """The same gradients block by block, and the same taps."""
    made = dict(
        resnet18_sb_s32u1=lambda: timm.create_model('resnet18_sb_s32u1', num_classes=5),
        resnet18_sb_s32u1d=lambda: timm.create_model('resnet18_sb_s32u1', sb_double=True, num_classes=5),
        resnet18_sbpp=lambda: timm.create_model('resnet50_sbpp', layers=(2, 2, 2, 2), num_classes=5),
    )[name]().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    grads = []
    for enable in (False, True):
        made.set_grad_checkpointing(enable)
        made.zero_grad()
        made(x).square().sum().backward()
        grads.append([p.grad for p in made.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    features, taps = made.forward_intermediates(x)
    torch.testing.assert_close(features, made.forward_features(x))
    assert [tap.shape[1] for tap in taps] == [info['num_chs'] for info in made.feature_info]


def test_copies_keep_the_stage_in_charge(small):
    ema = ModelEmaV3(small)
    x = torch.randn(1, 3, 32, 32)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), ema.module):
        twin.eval()
        assert torch.equal(twin(x), small(x)) and type(twin) is type(small)
        twin.layer3.basis.data.zero_()
        assert not torch.equal(twin(x), small(x))


def test_heads_attach(small):
    model = timm_spinal.attach_head(copy.deepcopy(small), 'spinal', head_width=8)
    assert isinstance(model, ResNet) and list(model.shared_stages()) == list(small.shared_stages())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert timm_spinal.ensure_registered('resnet18_sb_s32u1_xnidr')
    model = timm.create_model('resnet18_sb_s32u1_xnidr', num_classes=3, device='meta', sb_rank=8)
    assert model.layer1.basis.shape == (8, 64, 3, 3)
    assert model(torch.zeros(1, 3, 64, 64, device='meta')).shape == (1, 3)


def test_output_stride_dilates_the_bases():
    model = timm.create_model('resnet18_sb_s32u1', output_stride=8, num_classes=0, global_pool='').eval()
    assert [model.layer3[1].conv1.dilation, model.layer4[1].conv2.dilation] == [2, 4]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 512, 8, 8)


@pytest.mark.parametrize('options, message', [
    (dict(sb_rank=0, sb_unique=0), r'\(S0\) and without unique filters \(U0\)'),
    (dict(sb_rank=600), '600 shared and 1 unique filters are more than the 576'),
    (dict(sb_rank=300, sb_double=True), '600 shared and 1 unique'),
    (dict(sb_rank=-2), 'must not be negative'),
    (dict(sb_rank=0, sb_double=True), 'sb_double asks for two bases per stage'),
    (dict(sb_stages='15'), "sb_stages '15' must be digits of stages"),
    (dict(sb_stages=''), "sb_stages '' must be"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('resnet18_sb_s32u1', device='meta', **options)


def test_other_papers_options_are_not_taken_silently():
    with pytest.raises(TypeError):
        timm.create_model('resnet50_sb', device='meta', sb_rank=3)
    with pytest.raises(TypeError):
        timm.create_model('resnet18_sb_s32u1', device='meta', ic_scope='all')


def test_state_dict_keys_are_stable():
    keys = [k for k in timm.create_model('resnet34_sb_s48u1d', device='meta').state_dict() if k.startswith('layer2.')]
    assert keys[:2] == ['layer2.basis', 'layer2.basis2']
    block = [k[len('layer2.1.'):] for k in keys if k.startswith('layer2.1.') and 'num_batches' not in k]
    norm = ('weight', 'bias', 'running_mean', 'running_var')
    site = ['unique', 'coeff', *(f'{name}.{k}' for name in ('basis_norm', 'norm') for k in norm)]
    assert block == [f'conv{i}.{k}' for i in (1, 2) for k in site]


def test_stages_are_shared_stages_for_features_only():
    backbone = timm.create_model('resnet50_sb', features_only=True, layers=(2, 2, 2, 2)).eval()
    assert isinstance(backbone.layer2, SharedStage)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
