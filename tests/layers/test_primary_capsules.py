"""Primary blocks: the papers' sizes, both orders of pooling, the capsule axis."""

import pytest
import torch

from timm_spinal.layers import PrimaryCapsules, squash

BLOCKS = ('depthwise', 'bottleneck')


def make(block, pool_first, in_features=32, **kwargs):
    torch.manual_seed(0)
    return PrimaryCapsules(in_features, block, capsules=4, pool_first=pool_first, **kwargs)


@pytest.mark.parametrize('in_features, block, width, count', [
    (1280, 'depthwise', 1024, 12_800 + 2_560 + 1_311_744 + 16),
    (2048, 'bottleneck', 2048, 1_050_112 + 2_360_832 + 1_054_720 + 16),
    (1024, 'vector', 1024, 16),
])
def test_papers_sizes(in_features, block, width, count):
    primary = PrimaryCapsules(in_features, block, device='meta')
    assert sum(p.numel() for p in primary.parameters()) == count
    assert primary.out_features == width


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('training', [True, False])
def test_pooling_first_gives_the_same(block, training):
    x = torch.randn(5, 32, 7, 7, generator=torch.Generator().manual_seed(1))
    results = []
    for pool_first in (True, False):
        primary = make(block, pool_first)
        for norm in (m for m in primary.modules() if hasattr(m, 'running_mean')):
            torch.nn.init.uniform_(norm.running_mean, generator=torch.Generator().manual_seed(2))
            torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(3))
        out = primary.train(training)(x)
        out.cos().sum().backward()
        results.append((out, [p.grad for p in primary.parameters()], list(primary.buffers())))
    (first, first_grads, first_buffers), (literal, literal_grads, literal_buffers) = results
    torch.testing.assert_close(first, literal, atol=1e-5, rtol=1e-5)
    # a bias in front of a norm of the batch has no gradient but rounding
    torch.testing.assert_close(first_grads, literal_grads, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first_buffers, literal_buffers)


def test_pooling_first_spares_the_1x1_convolution_the_map():
    sizes = {}
    for pool_first in (True, False):
        primary = make('depthwise', pool_first)
        primary.block.conv_pw.register_forward_hook(lambda m, i, o, k=pool_first: sizes.update({k: o[0, 0].numel()}))
        primary(torch.randn(2, 32, 7, 7))
    assert sizes == {True: 1, False: 49}


def test_depthwise_block_by_hand():
    primary = make('depthwise', pool_first=True).eval()
    x = torch.randn(2, 32, 5, 5)
    block = primary.block
    pooled = block.conv_pw(block.norm(block.conv_dw(x))).mean((2, 3))
    capsules = squash(pooled.reshape(2, 4, 8))  # capsule i is channels 8 i .. 8 i + 7
    norm = primary.norm
    expected = ((capsules - norm.running_mean) / (norm.running_var + 1e-3).sqrt()).relu().reshape(2, 32)
    torch.testing.assert_close(primary(x), expected)
    assert (norm.eps, norm.momentum, norm.weight.shape) == (1e-3, 0.01, (8,))


def test_bottleneck_keeps_the_shortcut_and_has_no_last_relu():
    primary = make('bottleneck', pool_first=False).eval()
    torch.nn.init.zeros_(primary.block.conv3.weight)
    x = -torch.rand(2, 32, 3, 3)
    torch.testing.assert_close(primary.block(x), x.mean((2, 3)))


def test_capsule_norm_is_over_batch_and_capsules():
    primary = PrimaryCapsules(32, 'vector').train()
    x = torch.randn(6, 32)
    capsules = squash(x.reshape(6, 4, 8))
    flat = capsules.reshape(-1, 8)
    expected = ((flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-3).sqrt()).relu().reshape(6, 32)
    torch.testing.assert_close(primary(x), expected)


@pytest.mark.parametrize('kwargs, message', [
    (dict(block='mobile'), "Unknown primary block 'mobile'; use depthwise, bottleneck, vector"),
    (dict(block='bottleneck', capsules=5), '5 capsules of dimension 8 do not divide the 36 channels; choose another'),
    (dict(block='vector', capsules=5, dim=6), 'do not divide the 36 channels; use capsules=6'),
    (dict(capsules=-1), 'capsules must be a positive'),
    (dict(dim=0), 'capsule_dim must be a positive'),
])
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PrimaryCapsules(36, **kwargs)
