"""ProgressiveSpinalHead against the formulas of docs/papers/progressive_spinalnet.md, written out by hand."""

import pytest
import torch

from timm_spinal.layers import ProgressiveSpinalHead

KEYS = {'pspinal': [  # of a state dict, see tests/models/test_contract.py
    *[f'hidden.{block}.fc.{key}' for block in ('first', 'blocks.0', 'blocks.1', 'blocks.2')
      for key in ('weight', 'bias')],
    'fc.weight', 'fc.bias',
]}


@pytest.mark.parametrize('in_features, num_classes, options, count', [
    (2048, 101, dict(), 2_166_949),
    (2048, 250, dict(width=1024), 16_220_410),
    (2048, 10, dict(width=512), 5_810_186),
    (256, 10, dict(width=64), 95_498),
    (256, 10, dict(width=64, norm_layer='batchnorm1d'), 96_010),
    (256, 62, dict(width=128), 277_566),
    (784, 10, dict(width=128, norm_layer='batchnorm1d'), 514_218),
])
def test_parameter_counts(in_features, num_classes, options, count):
    """See docs/papers/progressive_spinalnet.md, section 4 and its tables."""
    head = ProgressiveSpinalHead(in_features, num_classes, device='meta', **options)
    assert sum(p.numel() for p in head.parameters()) == count


def test_forward_is_the_papers_formula():
    """z_0 = x; h_i = block(z_{i-1}); z_i = [z_{i-1}, h_i]; y = fc(z_4)."""
    torch.manual_seed(0)
    head = ProgressiveSpinalHead(9, 3, width=4).eval()
    x = z = torch.randn(5, 9)
    for block in [head.hidden.first, *head.hidden.blocks]:
        z = torch.cat([z, (z @ block.fc.weight.T + block.fc.bias).clamp(min=0)], 1)
    assert z.shape[1] == head.hidden_size == 9 + 4 * 4
    torch.testing.assert_close(head(x, pre_logits=True), z)
    torch.testing.assert_close(head(x), z @ head.fc.weight.T + head.fc.bias)


def test_skip_dropout_is_drawn_once_and_not_seen_by_the_first_layer():
    torch.manual_seed(0)
    head = ProgressiveSpinalHead(50, 3, width=4, skip_dropout=0.5)
    x = torch.rand(6, 50) + 1.
    z = head(x, pre_logits=True)
    dropped = z[:, :50]
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * x[kept])
    torch.testing.assert_close(z[:, 50:54], head.hidden.first(x))
    torch.testing.assert_close(z[:, 54:58], head.hidden.blocks[0](z[:, :54]))
    torch.testing.assert_close(z[:, 62:66], head.hidden.blocks[2](z[:, :62]))


def test_layer_dropout_and_norm():
    """The QMNIST setting: Dropout 0.5, Linear, BatchNorm, ReLU, and Dropout 0.5 in front of the output."""
    head = ProgressiveSpinalHead(16, 10, width=4, dropout=0.5, norm_layer='batchnorm1d')
    assert [name for name, _ in head.hidden.first.named_children()] == ['drop', 'fc', 'norm', 'act']
    assert head.drop.p == 0.5
    assert head.hidden.skip_drop.p == 0.2


@pytest.mark.parametrize('options, message', [
    (dict(skip_dropout=1.), r'skip_dropout must lie in \[0, 1\)'),
    (dict(width=-1), 'width must be a positive whole number'),
    (dict(layers=0), 'layers must be a positive whole number'),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveSpinalHead(8, 2, **options)
