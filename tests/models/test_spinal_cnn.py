import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spinal.models.spinal_cnn  # noqa: F401

# docs/papers/spinalnet.md, sections 3.2 and 4.
COUNTS = [
    ('spinalcnn_plain', {}, 21_840),
    ('spinalcnn_a1', {}, 13_818),
    ('spinalcnn_a1', dict(head_width=10), 16_050),
    ('spinalcnn_a2', {}, 395_120),
    ('spinalcnn_a2', dict(head_width=50), 677_640),
    ('spinalcnn_a2', dict(head_width=300), 5_761_640),
]


@pytest.mark.parametrize('name,kwargs,expected', COUNTS)
def test_parameter_counts(name, kwargs, expected):
    assert sum(p.numel() for p in timm.create_model(name, device='meta', **kwargs).parameters()) == expected


def taps_by_hand(state, x):
    conv1 = F.relu(F.max_pool2d(F.conv2d(x, state['stages.0.0.weight'], state['stages.0.0.bias']), 2))
    conv2 = F.relu(F.max_pool2d(F.conv2d(conv1, state['stages.2.0.weight'], state['stages.2.0.bias']), 2))
    return [tap.flatten(1) for tap in (x, conv1, conv2)]


def chain_by_hand(state, prefix, x, layers):
    """[h_0 .. h_{L-1}] of a spinal chain with two halves, Linear and ReLU."""
    size, h = x.shape[1] // 2, []
    for i in range(layers):
        block = f'{prefix}.first' if i == 0 else f'{prefix}.blocks.{i - 1}'
        half = x[:, (i % 2) * size:(i % 2 + 1) * size]
        z = torch.cat([half, h[-1]], 1) if h else half
        h.append(F.relu(F.linear(z, state[f'{block}.fc.weight'], state[f'{block}.fc.bias'])))
    return h


def test_one_chain_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('spinalcnn_a1').eval()
    state, x = model.state_dict(), torch.randn(5, 1, 28, 28)
    conv2 = taps_by_hand(state, x)[-1]
    assert conv2.shape == (5, 320)
    h = torch.cat(chain_by_hand(state, 'head.hidden', conv2, 6), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), F.linear(h, state['head.fc.weight'], state['head.fc.bias']))


@pytest.mark.parametrize('in_chans', [1, 3])
def test_three_chains_by_hand_in_the_order_pixels_conv1_conv2(in_chans):
    torch.manual_seed(0)
    model = timm.create_model('spinalcnn_a2', in_chans=in_chans).eval()
    state, x = model.state_dict(), torch.randn(5, in_chans, 28, 28)
    taps = taps_by_hand(state, x)
    assert [tap.shape[1] for tap in taps] == [784 * in_chans, 1440, 320]
    h = []
    for i, (tap, layers) in enumerate(zip(taps, (10, 8, 8))):
        h += chain_by_hand(state, f'head.hidden.chains.{i}', tap, layers)
    z = F.relu(F.linear(torch.cat(h, 1), state['head.hidden.out.fc.weight'], state['head.hidden.out.fc.bias']))
    with torch.no_grad():
        torch.testing.assert_close(model(x), F.linear(z, state['head.fc.weight'], state['head.fc.bias']))


def test_plain_net_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('spinalcnn_plain').eval()
    state, x = model.state_dict(), torch.randn(5, 1, 28, 28)
    z = F.relu(F.linear(taps_by_hand(state, x)[-1], state['head.hidden.0.fc.weight'], state['head.hidden.0.fc.bias']))
    with torch.no_grad():
        torch.testing.assert_close(model(x), F.linear(z, state['head.fc.weight'], state['head.fc.bias']))
    assert model.head.drop.p == 0.5 and not [m for m in model.head.hidden.modules() if isinstance(m, torch.nn.Dropout)]


def test_dropout_is_on_conv2_channels_before_pooling():
    stage = timm.create_model('spinalcnn_a1').stages[2]
    assert [type(m).__name__ for m in stage] == ['Conv2d', 'Dropout2d', 'MaxPool2d', 'ReLU']
    assert stage[1].p == 0.5


def test_other_sizes_pool_the_last_map_to_the_papers_grid():
    torch.manual_seed(0)
    model = timm.create_model('spinalcnn_a1').eval()
    x = torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 20, 7, 7)
        torch.testing.assert_close(model(x), model.head(F.adaptive_avg_pool2d(features, 4).flatten(1)))


def test_concat_pooling_is_refused_by_the_three_chains():
    with pytest.raises(AssertionError, match='Concat pooling'):
        timm.create_model('spinalcnn_a2', global_pool='catavgmax')
    with pytest.raises(AssertionError, match='Concat pooling'):
        timm.create_model('spinalcnn_a2').reset_classifier(7, 'catavgmax')


def test_state_dict_keys_are_stable():
    convs = [f'stages.{i}.0.{k}' for i in (0, 2) for k in ('weight', 'bias')]
    fc = ['head.fc.weight', 'head.fc.bias']

    def chain(prefix, layers):
        blocks = ['first', *(f'blocks.{i}' for i in range(layers - 1))]
        return [f'{prefix}.{block}.fc.{k}' for block in blocks for k in ('weight', 'bias')]

    assert list(timm.create_model('spinalcnn_a1').state_dict()) == convs + chain('head.hidden', 6) + fc
    chains = [key for i, layers in enumerate((10, 8, 8)) for key in chain(f'head.hidden.chains.{i}', layers)]
    out = ['head.hidden.out.fc.weight', 'head.hidden.out.fc.bias']
    assert list(timm.create_model('spinalcnn_a2').state_dict()) == convs + chains + out + fc


@pytest.mark.parametrize('widths, message', [
    ([], "widths is empty; give the width of each hidden layer, or use the head 'linear'"),
    ([50, 0], 'widths must be a positive whole number, got 0'),
])
def test_widths_out_of_range(widths, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('spinalcnn_plain', head_widths=widths)
