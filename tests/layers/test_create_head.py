import inspect

import pytest
import torch

from timm_spinal.layers import HEAD_PRESETS, HEADS, create_head, head_options


def num_params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_defaults_are_those_of_the_papers():
    assert head_options('spinal') == dict(
        layers=4, splits=2, width=512, dropout=0.5, norm_layer='batchnorm1d', act_layer='relu', shared=False, preset='')
    assert head_options('pspinal') == dict(
        layers=4, width=200, skip_dropout=0.2, dropout=0., norm_layer='', act_layer='relu', preset='')
    assert head_options('linear') == {}
    for head in ('caps', 'xnodr', 'xnidr'):
        assert head_options(head) == dict(
            primary='depthwise', capsules=0, capsule_dim=8, class_dim=16, iterations=3, dropout=0., pool_first=True,
            logit_scale=False, norm_momentum=0.01, norm_eps=1e-3, memory='auto', packed=False)


@pytest.mark.parametrize('head, preset, in_features, num_classes, count', [
    ('spinal', 'stl10', 2048, 10, 2_910_218),
    ('spinal', 'bird225', 2048, 225, 8_274_145),
    ('spinal', 'cifar100', 2048, 100, 3_094_628),
    ('spinal', 'caltech101', 2048, 101, 7_766_117),
    ('spinal', 'fruits360', 2048, 131, 657_358),
    ('spinal', 'oxford102', 2048, 102, 491_130),
    ('spinal', 'stanford_cars', 2048, 196, 1_072_708),
    ('spinal', 'cinic10', 2048, 10, 84_010),
    ('spinal', 'customizable', 2048, 10, 7_658_506),
    ('spinal', 'shared', 2048, 10, 12_290),
    ('spinal', 'cifar_vgg', 512, 10, 1_333_258),
    ('spinal', 'cifar_cnn', 4096, 10, 1_103_370),
    ('spinal', 'mnist_vgg5', 256, 10, 121_354),
    ('pspinal', 'vanilla_mnist', 784, 10, 514_218),
    ('pspinal', 'kmnist', 256, 10, 95_498),
    ('pspinal', 'qmnist', 256, 10, 96_010),
    ('pspinal', 'emnist_letters', 256, 62, 277_566),
    ('pspinal', 'caltech101', 2048, 101, 2_166_949),
    ('pspinal', 'bird250', 2048, 250, 16_220_410),
    ('pspinal', 'fruits360', 2048, 131, 15_489_155),
    ('pspinal', 'stl10', 2048, 10, 14_745_610),
])
def test_presets_have_the_papers_counts(head, preset, in_features, num_classes, count):
    """See docs/papers/spinalnet.md, sections 3.4, 3.5 and 4, and docs/papers/progressive_spinalnet.md, section 3."""
    assert num_params(create_head(head, in_features, num_classes, preset=preset, device='meta')) == count


def test_every_preset_builds():
    for head, presets in HEAD_PRESETS.items():
        for preset in presets:
            create_head(head, 64, 3, preset=preset, device='meta')


def test_explicit_options_win_over_the_preset():
    assert create_head('pspinal', 8, 2, preset='caltech101', width=5).hidden_size == 8 + 4 * 5


def test_options_can_be_written_to_json():
    for head in HEADS:
        for value in head_options(head).values():
            assert isinstance(value, (str, int, float, bool))
        assert 'width' in head_options(head) or head == 'linear' or HEADS[head].needs_feature_map
        assert inspect.isclass(HEADS[head])


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(head='spinel'), ValueError, "Unknown head 'spinel'.*Did you mean 'spinal'"),
    (dict(head='spinal', widht=3), TypeError, "no option 'widht'.*Did you mean 'width'"),
    (dict(head='pspinal', splits=3), TypeError, "no option 'splits'"),
    (dict(head='spinal', preset='vg'), ValueError, "no preset 'vg'.*Did you mean 'vgg'"),
    (dict(head='mlp', preset='vgg'), ValueError, "no preset 'vgg'; its presets are none"),
])
def test_errors_name_the_nearest(kwargs, error, message):
    with pytest.raises(error, match=message):
        create_head(in_features=8, num_classes=2, **kwargs)
