"""SpinalHead against the formulas of docs/papers/spinalnet.md, written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from timm_spinal.layers import SpinalHead, SpinalLayers

PLAIN = dict(dropout=0., norm_layer='')
KEYS = {'spinal': [  # of a state dict, see tests/models/test_contract.py
    *[f'hidden.{block}.{key}' for block in ('first', 'blocks.0', 'blocks.1', 'blocks.2') for key in (
        'fc.weight', 'fc.bias', 'norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var',
        'norm.num_batches_tracked')],
    'fc.weight', 'fc.bias',
]}


def num_params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('in_features, num_classes, options, count', [
    (2048, 10, dict(), 2_910_218),
    (2048, 10, dict(width=20, **PLAIN), 84_010),
    (2048, 10, dict(layers=10, **PLAIN), 7_658_506),
    (2048, 101, dict(width=1024), 7_766_117),
    (2048, 131, dict(width=131, **PLAIN), 657_358),
    (2048, 10, dict(layers=8, splits=8, width=20, shared=True, **PLAIN), 12_290),
    (1024, 10, dict(layers=8, splits=8, width=10, shared=True, **PLAIN), 3_490),
    (2048, 1000, dict(layers=4, splits=2, width=512, shared=True, **PLAIN), 3_360_744),
    (256, 10, dict(width=128), 121_354),
    (320, 10, dict(layers=6, width=8, **PLAIN), 8_538),
    (25088, 10, dict(width=1024), 54_579_210),
])
def test_parameter_counts(in_features, num_classes, options, count):
    """See docs/papers/spinalnet.md, section 4 and its tables."""
    assert num_params(SpinalHead(in_features, num_classes, device='meta', **options)) == count


@pytest.mark.parametrize('in_features, splits, layers, windows', [
    (8, 2, 4, [(0, 4), (4, 8), (0, 4), (4, 8)]),
    (8, 4, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
    (9, 2, 4, [(0, 5), (4, 9), (0, 5), (4, 9)]),
    (2049, 2, 2, [(0, 1025), (1024, 2049)]),
    (100, 3, 3, [(0, 34), (34, 68), (66, 100)]),
])
def test_splits_read_every_feature(in_features, splits, layers, windows):
    hidden = SpinalLayers(in_features, layers=layers, splits=splits, width=3, **PLAIN)
    x = torch.arange(in_features, dtype=torch.float32).expand(2, -1)
    read = [hidden.split(x, i)[1].long().tolist() for i in range(layers)]
    assert read == [list(range(start, stop)) for start, stop in windows]
    assert set().union(*map(set, read)) == set(range(in_features))


def test_every_feature_reaches_the_output_at_odd_widths():
    """The original loses the last feature at width 2049 and fails at 2047 (docs/papers/spinalnet.md, section 6, D7)."""
    for in_features in (2047, 2049):
        head = SpinalHead(in_features, 2, width=4, **PLAIN)
        x = torch.randn(3, in_features, requires_grad=True)
        head(x).sum().backward()
        assert (x.grad.abs().sum(0) > 0).float().mean() > 0.99
        assert x.grad[:, -1].abs().sum() > 0


def test_forward_is_the_papers_formula():
    """h_0 = block(s_0); h_i = block([s_i, h_{i-1}]); y = fc([h_0 .. h_3])."""
    torch.manual_seed(0)
    head = SpinalHead(10, 3, width=6).eval()
    blocks = [head.hidden.first, *head.hidden.blocks]
    for block in blocks:  # statistics that matter
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2.)
    x = torch.randn(7, 10)
    halves = x[:, :5], x[:, 5:]
    carry, outputs = x[:, :0], []
    for i, block in enumerate(blocks):
        z = F.linear(torch.cat([halves[i % 2], carry], 1), block.fc.weight, block.fc.bias)
        norm = block.norm
        z = (z - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        carry = z.clamp(min=0)
        outputs.append(carry)
    pre_logits = torch.cat(outputs, 1)
    torch.testing.assert_close(head(x, pre_logits=True), pre_logits)
    torch.testing.assert_close(head(x), pre_logits @ head.fc.weight.T + head.fc.bias)


def test_shared_block_is_applied_again():
    torch.manual_seed(0)
    head = SpinalHead(8, 2, layers=4, splits=4, width=3, shared=True, **PLAIN)
    x = torch.randn(5, 8)
    first, block = head.hidden.first.fc, head.hidden.blocks[0].fc
    h = [first(x[:, :2]).relu()]
    for i in range(1, 4):
        h.append(block(torch.cat([x[:, 2 * i:2 * i + 2], h[-1]], 1)).relu())
    torch.testing.assert_close(head(x, pre_logits=True), torch.cat(h, 1))


def test_dropout_is_in_front_of_every_linear():
    head = SpinalHead(8, 2, width=4, dropout=0.5)
    drops = [m for m in head.modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in drops] == [0.5] * 5
    names = [name for name, _ in head.hidden.first.named_children()]
    assert names == ['drop', 'fc', 'norm', 'act']


def test_single_layer():
    head = SpinalHead(6, 2, layers=1, splits=1, width=4, **PLAIN)
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), head.fc(head.hidden.first.fc(x).relu()))


@pytest.mark.parametrize('options, message', [
    (dict(layers=2, splits=4), 'layers .2. must be at least splits .4.'),
    (dict(splits=9, layers=9), 'splits .9. must not exceed the 8 input features'),
    (dict(width=0), 'width must be a positive whole number'),
    (dict(dropout=1.), r'dropout must lie in \[0, 1\)'),
    (dict(norm_layer='batchnorm3d'), "Unknown norm_layer 'batchnorm3d'"),
    (dict(act_layer='rellu'), "Unknown act_layer 'rellu'"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpinalHead(8, 2, **options)


@pytest.mark.parametrize('layers, width', [(1, 5), (4, 3), (6, 1)])
def test_one_split_and_no_carry_is_one_hidden_layer(layers, width):
    """The step of the universal approximation argument, docs/papers/spinalnet.md, section 2."""
    torch.manual_seed(0)
    spinal = SpinalLayers(7, layers=layers, splits=1, width=width, **PLAIN)
    one_layer = torch.nn.Sequential(torch.nn.Linear(7, layers * width), torch.nn.ReLU())
    x = torch.randn(20, 7)
    with torch.no_grad():
        blocks = [spinal.first, *spinal.blocks]
        for block in blocks:
            block.fc.weight[:, 7:] = 0.  # what reads the layer before
        one_layer[0].weight.copy_(torch.cat([block.fc.weight[:, :7] for block in blocks]))
        one_layer[0].bias.copy_(torch.cat([block.fc.bias for block in blocks]))
        assert spinal.split_size == 7 and spinal.out_features == layers * width
        torch.testing.assert_close(spinal(x), one_layer(x))
        if layers > 1:  # with its carry it is another function
            spinal.blocks[0].fc.weight[:, 7:] = 1.
            assert not torch.allclose(spinal(x), one_layer(x))
