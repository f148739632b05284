"""What a new row of CONVOLUTIONS or HEADS gets without a word of it anywhere else: rows made here, which are real.

The convolution is weight standardisation (Qiao et al. 2019, https://arxiv.org/abs/1903.10520) with a gain of each
filter, the head one gated hidden layer.
"""

import inspect
import logging

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import _registry, get_pretrained_cfg, save_for_hf
from torch import nn

import timm_spinal
from timm_spinal import CONVOLUTIONS, HEADS, Convolution
from timm_spinal.cost import cost_of
from timm_spinal.hub.card import make_card
from timm_spinal.hub.options import PublishOptions
from timm_spinal.hub.publication import open_model
from timm_spinal.layers import ClassifierHead
from timm_spinal.models import convolution_variants, head_variants

from . import test_contract

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
CONTRACT = [check for name, check in vars(test_contract).items()
            if name.startswith('test_') and 'onnx' not in name and 'name' in inspect.signature(check).parameters]


class WSConv2d(nn.Conv2d):
    """Convolution with filters of mean 0 and variance 1, times a learned gain over sqrt(n), n inputs a filter."""

    def __init__(
            self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
            padding_mode='zeros', device=None, dtype=None, ws_eps: float = 1e-5, ws_init: float = 1.):
        if ws_eps < 0:
            raise ValueError(f'ws_eps must not be negative, got {ws_eps}.')
        dd = dict(device=device, dtype=dtype)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **dd)
        self.ws_eps, self.ws_init = ws_eps, ws_init
        self.ws_gain = nn.Parameter(torch.empty(out_channels, **dd))
        self.reset_added_parameters()

    @torch.jit.ignore
    def reset_added_parameters(self):
        nn.init.constant_(self.ws_gain, self.ws_init)

    def forward(self, x):
        w = self.weight.flatten(1)
        w = w - w.mean(1, keepdim=True)
        scale = self.ws_gain / (w.shape[1] * (w.square().mean(1) + self.ws_eps)).sqrt()
        return self._conv_forward(x, (scale.unsqueeze(1) * w).view_as(self.weight), self.bias)


def keep_deviation(model, options):
    """Gains with which a filter of mean 0 stays what it is."""
    if 'init' in options:
        return False
    for conv in model.modules():
        if isinstance(conv, WSConv2d):
            var = conv.weight.flatten(1).var(1, correction=0)
            conv.ws_gain.data = (conv.weight[0].numel() * (var + conv.ws_eps)).sqrt()
    return True


class GatedLayer(nn.Module):
    """(N, F) -> (N, W): a linear layer times the sigmoid of another."""

    def __init__(self, in_features, width: int = 8, dropout: float = 0.25, device=None, dtype=None):
        super().__init__()
        self.value = nn.Linear(in_features, width, device=device, dtype=dtype)
        self.gate = nn.Linear(in_features, width, device=device, dtype=dtype)
        self.out_features, self.dropout = width, dropout

    def forward(self, x):
        return self.value(x) * self.gate(x).sigmoid()


class GatedHead(ClassifierHead):
    hidden_layers = GatedLayer
    paper = '1612.08083'


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Both rows, and a registry of timm that forgets their models."""
    row = Convolution('ws', WSConv2d, title='weight-standardised', noun='standardisation', paper='1903.10520',
                      start=keep_deviation)
    monkeypatch.setitem(CONVOLUTIONS, 'ws', row)
    monkeypatch.setitem(HEADS, 'gated', GatedHead)
    before = set(timm.list_models())
    yield
    for name in set(timm.list_models()) - before:
        for module in (convolution_variants, head_variants):
            if module.default_cfgs.pop(name, None):
                delattr(module, name)
                module.__all__.remove(name)
        _registry._clear_model_entries(name)
        del _registry._model_entrypoints[name]


@pytest.fixture
def plain_file(tmp_path):
    """A plain model with filters of mean 0, and its weights in a file."""
    torch.manual_seed(1)
    plain = timm.create_model('test_resnet', num_classes=7, zero_init_last=False)
    for conv in plain.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.data -= conv.weight.data.mean((1, 2, 3), keepdim=True)
    file = tmp_path / 'plain.safetensors'
    safetensors.torch.save_file(plain.state_dict(), file)
    overlay = dict(file=str(file), num_classes=7)
    return plain.eval(), dict(pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('check', CONTRACT, ids=lambda check: check.__name__)
def test_the_contract(check, tmp_path):
    """Every function of the contract that takes a name, on a model with both rows."""
    values = dict(name='wstest_resnet_gated', tmp_path=tmp_path, scale=100.)
    check(**{key: values[key] for key in inspect.signature(check).parameters})


def test_the_contract_is_not_empty():
    assert len(CONTRACT) >= 8 and test_contract.test_exports_with_a_free_batch in CONTRACT


def test_options_and_refusals():
    assert CONVOLUTIONS['ws'].options == dict(ws_scope='spatial', ws_depthwise=False, ws_eps=1e-5, ws_init=1.)
    assert timm_spinal.ensure_registered('wsresnet18.backbone_a1_in1k')
    model = timm.create_model('wsresnet18', ws_scope='all', ws_init=0.5, num_classes=3, in_chans=1)
    assert isinstance(model.conv1, WSConv2d) and model.conv1.ws_gain.tolist() == [0.5] * 64
    assert sum(isinstance(module, WSConv2d) for module in model.modules()) == 20 and model.fc.out_features == 3
    with pytest.raises(TypeError, match='ws_esp'):
        timm.create_model('wsresnet18', ws_esp=1.)
    with pytest.raises(TypeError, match="WS convolutions have no option 'esp'; .*eps, init. Did you mean 'eps'?"):
        timm_spinal.convert(timm.create_model('resnet18', device='meta'), 'ws', esp=1.)
    plain = timm.create_model('resnet18', device='meta')
    with pytest.raises(ValueError, match='ws_eps must not be negative, got -1'):
        timm_spinal.convert(plain, 'ws', eps=-1)
    assert not any(isinstance(module, WSConv2d) for module in plain.modules())
    with pytest.raises(ValueError, match="ws_scope 'none' is unknown"):
        timm_spinal.convert(plain, 'ws', scope='none')
    with pytest.raises(ValueError, match="Unknown convolution 'wss'; convolutions are ic, ws. Did you mean 'ws'?"):
        timm_spinal.convert(plain, 'wss')
    for name, other in (('icresnet18', 'IC'), ('wsresnet18', 'WS')):
        with pytest.raises(ValueError, match=f'{name} has {other} convolutions already'):
            timm_spinal.convert(timm.create_model(name, device='meta'), 'ws')
    ours, timms = get_pretrained_cfg('wsresnet18'), get_pretrained_cfg('resnet18')
    assert ours.tag == f'backbone_{timms.tag}' and ours.hf_hub_id == timms.hf_hub_id
    assert ours.paper_ids == 'arXiv:1903.10520'


def test_features_are_those_of_the_whole_model(tmp_path):
    timm_spinal.ensure_registered('wstest_resnet')
    torch.manual_seed(0)
    whole = timm.create_model('wstest_resnet', ws_init=2.).eval()
    save_for_hf(whole, str(tmp_path), safe_serialization=True)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    maps, intermediates = features(X), whole.forward_intermediates(X, intermediates_only=True)
    assert len(maps) == 5
    for feature, expected in zip(maps, intermediates):
        torch.testing.assert_close(feature, expected)
    assert {module.ws_init for module in features.modules() if isinstance(module, WSConv2d)} == {2.}


def test_plain_weights_start_a_converted_model_as_the_plain_one(plain_file, caplog):
    plain, pretrained = plain_file
    timm_spinal.ensure_registered('wstest_resnet')
    with caplog.at_level(logging.WARNING):
        model = timm.create_model('wstest_resnet', **pretrained).eval()
    convs = sum(isinstance(module, WSConv2d) for module in model.modules())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"wstest_resnet: the plain model's weights are loaded, {convs} tensors of the standardisation are "
                     'new, and BatchNorm statistics nearly fit: use timm_spinal.recalibrate_bn, or train.']
    assert len(model.loaded_weights.new) == convs and model.loaded_weights.left_out == []
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-4)
    other = timm.create_model('wstest_resnet', ws_init=0.5, **pretrained).eval()
    assert 'statistics do not fit' in caplog.text and not torch.allclose(other(X), plain(X), rtol=1e-2, atol=1e-2)
    timm_spinal.convert(plain, 'ws')
    assert plain.pretrained_cfg['architecture'] == 'wstest_resnet'


def test_a_state_dict_comes_back_and_an_incomplete_one_is_refused(tmp_path):
    timm_spinal.ensure_registered('wstest_resnet_gated')
    torch.manual_seed(0)
    model = timm.create_model('wstest_resnet_gated', num_classes=7, head_width=5, ws_scope='block').eval()
    for name, p in model.named_parameters():
        if name.endswith('ws_gain'):
            nn.init.uniform_(p, 0.5, 2.)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(X), model(X)) and again.loaded_weights.new == again.loaded_weights.left_out == []
    fewer = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).eval()
    assert torch.equal(fewer.forward_features(X), model.forward_features(X)) and fewer(X).shape == (2, 3)
    state = model.state_dict()
    gains = [name for name in state if name.endswith('ws_gain')]
    file = tmp_path / 'incomplete.safetensors'
    safetensors.torch.save_file({name: value for name, value in state.items() if name != gains[0]}, file)
    with pytest.raises(RuntimeError, match=f"lack 1 keys of the standardisation, such as '{gains[0]}'"):
        timm.create_model('wstest_resnet_gated', pretrained=True, num_classes=7, head_width=5, ws_scope='block',
                          pretrained_cfg_overlay=dict(file=str(file), num_classes=7))


def test_the_card_speaks_of_both_rows():
    timm_spinal.ensure_registered('wstest_resnet_gated')
    model = timm.create_model('wstest_resnet_gated', num_classes=7, head_width=5, ws_scope='block')
    source = open_model(model)
    options, cost = PublishOptions('me/ws', licence='mit'), cost_of(model, (3, 48, 48))
    card = make_card(source, options, cost, 'me/ws', 'hf-hub:me/ws')
    assert '`head_width=5`' in card and '`ws_scope=block`' in card
    for number in ('1903.10520', '1612.08083'):
        assert f'[arXiv {number}](https://arxiv.org/abs/{number})' in card and f'- arxiv:{number}' in card
    assert "timm_spinal.ensure_registered('wstest_resnet_gated')" in card


def test_folding_leaves_what_cannot_be_folded():
    timm_spinal.ensure_registered('wstest_resnet')
    torch.manual_seed(0)
    model = timm.create_model('wstest_resnet').double().eval()
    folded = timm_spinal.fold_batchnorm(model)
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in m.modules()) for m in (model, folded)]
    convs = sum(isinstance(module, WSConv2d) for module in model.modules())
    assert 0 < norms[1] == convs < norms[0]
    torch.testing.assert_close(folded(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)


def test_a_head_has_the_options_of_its_hidden_layers():
    assert timm_spinal.head_options('gated') == dict(width=8, dropout=0.25)
    assert list(inspect.signature(GatedHead).parameters)[-2:] == ['width', 'dropout']
    head = timm_spinal.attach_head(timm.create_model('test_vit'), 'gated', 3, head_width=6).attached_head.eval()
    assert head.hidden_size == 6 and head.drop.p == 0.25
    x = torch.randn(4, head.in_features)
    hidden = F.linear(x, head.hidden.value.weight, head.hidden.value.bias) * torch.sigmoid(head.hidden.gate(x))
    torch.testing.assert_close(head(x), F.linear(hidden, head.fc.weight, head.fc.bias))
    with pytest.raises(TypeError, match="Head 'gated' has no option 'widht'; .*Did you mean 'width'?"):
        timm_spinal.attach_head(timm.create_model('test_vit'), 'gated', head_widht=6)
