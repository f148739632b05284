"""Registered `<backbone>_<head>` models: names, cfgs, weights in and out."""

import logging
import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, save_for_hf

import timm_spinal
from timm_spinal import ensure_registered, list_models, register_head_variant
from timm_spinal.models.attach_head import headed_cls
from timm_spinal.models.head_variants import BACKBONES, CAPSULE_BACKBONES, CAPSULE_HEADS, VARIANT_HEADS

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    return timm.create_model('resnet18_pspinal', num_classes=7, head_width=24).eval()


@pytest.fixture(scope='module')
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    save_for_hf(trained, str(folder), safe_serialization=True)
    return folder


def test_every_row_of_the_table_is_registered():
    names = {f'{backbone}_{head}' for backbone in BACKBONES for head in VARIANT_HEADS}
    names |= {f'{backbone}_{head}' for backbone in CAPSULE_BACKBONES for head in CAPSULE_HEADS}
    assert len(names) == 42 + 18
    assert names <= set(list_models())
    assert all(is_model(name) and model_entrypoint(name).__name__ == name for name in names)
    assert list_models('resnet50_*spinal') == ['resnet50_pspinal', 'resnet50_spinal']
    assert 'resnet50' not in list_models()


@pytest.mark.parametrize('backbone', BACKBONES)
def test_tags_point_at_timms_own_weights(backbone):
    ours = get_pretrained_cfg(f'{backbone}_spinal')
    timms = get_pretrained_cfg(backbone)
    assert ours.tag == f'backbone_{timms.tag}'
    assert ours.hf_hub_id == timms.hf_hub_id and ours.hf_hub_id
    assert ours.input_size == timms.input_size and ours.mean == timms.mean
    assert ours.classifier == 'attached_head.fc'
    assert f'{backbone}_spinal.{ours.tag}' in list_models(pretrained=True)


@pytest.mark.parametrize('head', CAPSULE_HEADS)
@pytest.mark.parametrize('backbone, count', [
    ('mobilenetv2_100', 3_714_864), ('resnet50', 28_301_424), ('efficientnet_b0', 4_007_548 + 1_490_992),
    ('mobilenetv3_large_100', 4_202_032 + 1_490_992), ('resnet18', 11_176_512 + 362_800),
    ('convnext_tiny', 27_820_128 + 960_560),
])
def test_capsule_models_have_the_papers_counts(backbone, count, head):
    """See docs/papers/xnodr_xnidr.md, section 4, without the learned scale and shift."""
    model = timm.create_model(f'{backbone}_{head}', num_classes=10, device='meta')
    assert sum(p.numel() for p in model.parameters()) == count


def test_options_classes_and_channels():
    model = timm.create_model('resnet18_spinal', num_classes=37, in_chans=1, head_width=8, head_layers=6, drop_rate=0.1)
    assert model.get_classifier().weight.shape == (37, 48)
    assert model.conv1.weight.shape[1] == 1
    assert model.drop_rate == 0.1


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match='head_widht'):
        timm.create_model('resnet18_spinal', head_widht=3)


def test_a_timm_checkpoint_loads_as_the_backbone(tmp_path, caplog):
    plain = timm.create_model('resnet18', num_classes=11)
    file = tmp_path / 'resnet18.safetensors'
    safetensors.torch.save_file(plain.state_dict(), file)
    with caplog.at_level(logging.WARNING):
        model = timm.create_model('resnet18_pspinal', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    lines = [r.message for r in caplog.records if 'head' in r.message]
    assert lines == ['resnet18_pspinal: the backbone is pretrained, its pspinal head is new and needs training.']
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        if not name.startswith('fc.'):
            assert torch.equal(state[name], value)
    assert 'state_dict' not in model.pretrained_cfg


def test_one_channel_weights_are_summed_as_timm_does(tmp_path):
    plain = timm.create_model('resnet18')
    file = tmp_path / 'resnet18.safetensors'
    safetensors.torch.save_file(plain.state_dict(), file)
    model = timm.create_model(
        'resnet18_spinal', pretrained=True, in_chans=1, pretrained_cfg_overlay=dict(file=str(file)))
    torch.testing.assert_close(model.conv1.weight, plain.conv1.weight.sum(1, keepdim=True))


def test_a_saved_model_loads_back(trained, saved):
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    assert torch.equal(model(X), trained(X))
    assert model.pretrained_cfg['architecture'] == 'resnet18_pspinal'
    other_classes = timm.create_model(f'local-dir:{saved}', pretrained=True, num_classes=3).eval()
    features = trained.forward_features(X)
    pre_logits = trained.forward_head(features, pre_logits=True)
    assert torch.equal(other_classes.forward_head(features, pre_logits=True), pre_logits)
    assert other_classes(X).shape == (2, 3)
    embedding = timm.create_model(f'local-dir:{saved}', pretrained=True, num_classes=0).eval()
    assert torch.equal(embedding(X), pre_logits)
    maps = timm.create_model(f'local-dir:{saved}', pretrained=True, features_only=True).eval()(X)
    assert torch.equal(maps[-1], features)


def test_incomplete_weights_are_refused(saved, tmp_path):
    state = safetensors.torch.load_file(saved / 'model.safetensors')
    del state['layer1.0.conv1.weight']
    file = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(state, file)
    with pytest.raises(RuntimeError, match='fill 99 of 100 .* the model also has layer1.0.conv1.weight$'):
        timm.create_model(
            'resnet18_pspinal', pretrained=True, num_classes=7, head_width=24,
            pretrained_cfg_overlay=dict(file=str(file), num_classes=7))


def test_register_any_other_combination():
    assert register_head_variant('test_resnet', 'mlp') == 'test_resnet_mlp'
    assert register_head_variant('test_resnet', 'mlp') == 'test_resnet_mlp'
    model = timm.create_model('test_resnet_mlp', num_classes=3, head_width=8)
    assert model(X).shape == (2, 3)
    assert 'test_resnet_mlp' in timm_spinal.list_models('test_*')
    assert ensure_registered('test_vit_pspinal') and is_model('test_vit_pspinal')
    assert ensure_registered('resnet18') and ensure_registered('resnet50_pspinal.backbone_a1_in1k')
    assert not ensure_registered('nonsense_spinal') and not ensure_registered('resnet18_nonsense')


@pytest.mark.parametrize('backbone, head, message', [
    ('resnet5', 'spinal', "Unknown timm model 'resnet5'.*Did you mean 'resnet"),
    ('resnet18', 'spine', "Unknown head 'spine'"),
])
def test_register_errors(backbone, head, message):
    with pytest.raises(ValueError, match=message):
        register_head_variant(backbone, head)


def test_from_name_to_model_is_a_short_way():
    """Distinct functions of ours that are called between a name and its model, layers included."""
    headed_cls.cache_clear()  # as in a new process
    called = set()

    def note(frame, event, arg):
        if event == 'call' and frame.f_globals.get('__name__', '').startswith('timm_spinal.'):
            called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        timm.create_model('resnet50_pspinal', device='meta')
    finally:
        sys.setprofile(None)
    assert 5 < len(called) <= 12, sorted(name for *_, name in called)
