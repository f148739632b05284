import copy

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import timm_spinal
from timm_spinal import fold_bases, merge_bases
from timm_spinal.layers import SharedBasisConv2d


def seen(model):
    """Give every BatchNorm a past, negative weights included."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.)
            nn.init.normal_(module.weight, 1., 0.5)
            nn.init.normal_(module.bias)
    return model.eval()


def make(name='resnet18_sb_s32u1', **kwargs):
    torch.manual_seed(0)
    return seen(timm.create_model(name, num_classes=5, **kwargs))


def images(size=48):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model, other, x):
    """Greatest difference of the logits, relative to the greatest logit."""
    expected = other(x)
    return ((model(x) - expected).abs().max() / expected.abs().max()).item()


FORMS = [
    dict(),
    dict(sb_double=True, sb_rank=16),
    dict(sb_unique=0),
    dict(sb_rank=0, sb_unique=8),
    dict(sb_stages='24'),
    dict(output_stride=16),
]


@pytest.mark.parametrize('options', FORMS, ids=str)
def test_merged_model_is_timms_and_computes_the_same(options):
    model, x = make(**options), images()
    before = copy.deepcopy(model.state_dict())
    plain = merge_bases(model)
    assert type(plain) is ResNet and plain.pretrained_cfg['architecture'] == 'resnet18'
    assert {type(block) for stage in (plain.layer1, plain.layer4) for block in stage} == {BasicBlock}
    timms = timm.create_model('resnet18', num_classes=5, **{k: v for k, v in options.items() if k == 'output_stride'})
    assert list(plain.state_dict()) == list(timms.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in timms.named_parameters()]
    timms.load_state_dict(plain.state_dict())
    assert difference(plain, model, x) < 1e-5 and difference(timms.eval(), model, x) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), 'the model is changed'
    assert not plain.training and all(p.is_leaf and p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize('options', FORMS[:4], ids=str)
def test_folded_model_shares_and_computes_the_same(options):
    model, x = make(**options), images()
    folded = fold_bases(model)
    assert difference(folded, model, x) < 1e-5
    assert type(folded) is type(model) and folded.layer2.basis_names() == model.layer2.basis_names()
    convs = [m for m in folded.modules() if isinstance(m, SharedBasisConv2d)]
    assert all(not any(isinstance(m, nn.BatchNorm2d) for m in conv.modules()) for conv in convs)
    # 9 C u + R C + C numbers per convolution (docs/papers/shared_bases.md, section 8)
    for conv in convs:
        unique = 0 if conv.unique is None else len(conv.unique)
        chs, rank = conv.in_channels, conv.coeff.shape[1]
        assert sum(p.numel() for p in conv.parameters()) == 9 * chs * unique + rank * chs + chs
    assert difference(merge_bases(folded), model, x) < 1e-5
    assert difference(fold_bases(folded), folded, x) == 0.


def test_resnet34_with_two_bases_merges():
    model = make('resnet34_sb_s48u1d')
    plain = merge_bases(model)
    assert sum(p.numel() for p in plain.parameters()) == 21_797_672 - 995 * 513
    assert difference(plain, model, images(64)) < 1e-5


def test_some_stages():
    model, x = make(), images()
    part = merge_bases(fold_bases(model), ['layer1', 'layer3'])
    assert list(part.shared_stages()) == ['layer2', 'layer4'] and type(part.layer1) is nn.Sequential
    assert difference(part, model, x) < 1e-5
    with pytest.raises(ValueError, match="no decomposed stage 'layer5'; it has layer1, layer2, layer3, layer4"):
        merge_bases(model, ['layer5'])


@pytest.mark.parametrize('form', [
    merge_bases, fold_bases, lambda model: merge_bases(fold_bases(model), ['layer1', 'layer2'])])
def test_every_form_is_saved_and_made_again(form, tmp_path):
    """What timm writes to config.json says how to make it; the class count and the input channels are the model's."""
    model = make(in_chans=1)
    made = form(model)
    save_for_hf(made, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()[:, :1]
    assert type(again) is type(made) and torch.equal(again(x), made(x))
    assert difference(again, model, x) < 1e-5


def test_heads_are_kept():
    model = timm_spinal.attach_head(make(), 'spinal', head_width=8).eval()
    plain = merge_bases(model)
    again = timm.create_model('resnet18_spinal', num_classes=5, head_width=8).eval()
    assert type(plain) is type(again) and plain.pretrained_cfg['architecture'] == 'resnet18_spinal'
    again.load_state_dict(plain.state_dict())
    assert difference(again, model, images()) < 1e-5
    assert type(copy.deepcopy(plain)) is type(plain)


def test_merged_in_half_precision_is_merged_in_full():
    model = make().to(torch.bfloat16)
    plain = merge_bases(model)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    exact = merge_bases(copy.deepcopy(model).float())
    assert torch.equal(plain.layer2[1].conv1.weight, exact.layer2[1].conv1.weight.to(torch.bfloat16))


def with_batch_statistics():
    model = make()
    model.layer2[1].conv1.basis_norm = nn.BatchNorm2d(66, track_running_stats=False).eval()
    return model


@pytest.mark.parametrize('model, message', [
    (lambda: make().train(), 'in training mode, where its BatchNorms depend on the batch; call model.eval'),
    (with_batch_statistics, 'layer2.1.conv1 is normalised with statistics of the batch'),
    (lambda: timm.create_model('resnet50_sbpp', device='meta').eval(), 'a BatchNorm and a ReLU stand between'),
    (lambda: timm.create_model('mobilenetv2_100_sb', device='meta').eval(), 'a BatchNorm and a ReLU stand between'),
    (lambda: timm.create_model('resnet18', device='meta').eval(), 'ResNet is not a model with shared filter bases'),
    (lambda: timm.create_model('resnet18_sb_s32u1', features_only=True).eval(), 'without features_only'),
])
@pytest.mark.parametrize('function', [merge_bases, fold_bases])
def test_refusals(function, model, message):
    with pytest.raises(ValueError, match=f'{function.__name__}: .*{message}') as error:
        function(model())
    assert '\n' not in str(error.value)
