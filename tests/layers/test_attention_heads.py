"""The attention heads: values by hand, counts, formats, prefix tokens, reset."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay

import timm_spinal
from timm_spinal.layers import HEADS, create_head
from timm_spinal.layers.attention_heads import TokenHead

_MLDECODER = [f'hidden.{name}.{key}' for name in ('embed', 'q', 'kv', 'proj', 'fc1', 'fc2', 'norm1', 'norm2', 'norm3')
              for key in ('weight', 'bias')]
KEYS = dict(  # of a state dict on a ResNet, see tests/models/test_contract.py
    attn=['hidden.queries', 'hidden.value.weight', *[f'hidden.norm.{key}' for key in (
        'running_mean', 'running_var', 'num_batches_tracked')], 'fc.weight', 'fc.bias'],
    mldecoder=[*_MLDECODER, 'queries.weight', 'fc.weight', 'fc.bias'],
)
TOKEN_HEADS = list(KEYS)

X = torch.tensor([[1., 0, 2, -1], [0, 1, -1, 2], [3, -2, 0, 1]])
X2 = torch.tensor([[0., 0, 0, 0], [1, 1, 1, 1], [2, 0, 0, -2]])


def worked_example(**options) -> torch.nn.Module:
    """The example of docs/papers/attention_heads.md, section 1: C = 4, M = 2, K = 3."""
    head = create_head('attn', 4, 3, input_fmt='NLC', queries=2, **options)
    value = torch.tensor([[1., 0, 0, 1], [0, 1, 1, 0], [1, -1, 0, 0], [0, 0, 2, 1]])
    with torch.no_grad():
        head.hidden.queries.copy_(torch.tensor([[1., 0, 1, 0], [0, 2, 0, -1]]))
        head.hidden.value.weight.copy_(value[:head.hidden.out_features])
        head.fc.weight.copy_(torch.tensor([[1., 0, -1, 0], [0, 1, 0, 1], [1, 1, 1, 1]])[:, :head.hidden.out_features])
        head.fc.bias.copy_(torch.tensor([0., 1, -1]))
    return head


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=2e-6)


def test_efficient_probing_by_hand():
    head = worked_example().eval()
    close(head.hidden.attention(X[None])[0], [[0.468311, 0.063379, 0.468311], [0.603749, 0.366192, 0.030059]])
    close(head(X[None]), [[1.612148, 2.841305, 3.229155]])
    close(head(X2[None]), [[-0.168323, 1.753264, 1.610862]])
    close(worked_example(norm='').eval()(X[None], pre_logits=True), [[2., 0., 0.387851, 1.841306]])
    close(worked_example(norm='', reduction=2)(X[None], pre_logits=True), [[2., 1.147380]])


def test_efficient_probing_in_training_normalises_by_the_batch():
    head = worked_example().train()
    close(head(torch.stack([X, X2])), [[1.999993, 1.000002, -0.999994], [-1.999993, 0.999998, -1.000006]])
    close(head.hidden.norm.running_mean, [0.142232, 0.042232, 0.070041, 0.087497])
    close(head.hidden.norm.running_var, [0.966743, 0.935671, 0.919538, 1.086762])


def test_prefix_tokens_are_dropped_or_read():
    with_prefix = torch.cat([torch.full((1, 4), 2.), X])[None]
    close(worked_example(num_prefix_tokens=1).eval()(with_prefix), [[1.612148, 2.841305, 3.229155]])
    kept = worked_example(num_prefix_tokens=1, prefix='keep').eval()
    close(kept(with_prefix), [[2.677032, 6.658679, 7.724453]])


@pytest.mark.parametrize('width, queries, classes, params', [
    (192, 32, 1000, 236_008), (768, 32, 1000, 1_383_400), (1152, 128, 1000, 2_627_560), (192, 32, 10, 44_938)])
def test_counts_of_efficient_probing(width, queries, classes, params):
    head = create_head('attn', width, classes, queries=queries, device='meta')
    assert sum(p.numel() for p in head.parameters()) == params


def test_queries_that_do_not_divide_the_channels_are_fewer():
    assert create_head('attn', 368, 10, device='meta').hidden.num_queries == 23


@pytest.mark.parametrize('width, classes, params', [
    (512, 1000, 6_678_504), (1280, 1000, 7_268_328), (192, 1000, 6_432_744), (512, 10, 5_917_194)])
def test_counts_of_ml_decoder(width, classes, params):
    head = create_head('mldecoder', width, classes, device='meta')
    assert sum(p.numel() for p in head.parameters()) == params
    assert head.queries.weight.shape == (min(100, classes), 768)


def test_ml_decoder_is_torchs_decoder_layer_without_self_attention():
    """Against torch's own attention and layer norms, with the weights of our layer."""
    torch.manual_seed(0)
    head = create_head('mldecoder', 12, 5, dim=16, mlp_dim=24, num_heads=4, groups=2).eval()
    x = torch.randn(3, 12, 2, 2)
    layers = head.hidden
    mha = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([layers.q.weight, layers.kv.weight]))
        mha.in_proj_bias.copy_(torch.cat([layers.q.bias, layers.kv.bias]))
        mha.out_proj.load_state_dict(layers.proj.state_dict())
        e = layers.embed(x.flatten(2).transpose(1, 2)).relu()
        t = layers.norm1(2 * head.queries.weight.expand(3, 2, 16))
        t = layers.norm2(t + mha(t, e, e)[0])
        t = layers.norm3(t + layers.fc2(layers.fc1(t).relu()))
        logits = torch.stack([t[:, k // 3] @ head.fc.weight[k // 3][:, k % 3] + head.fc.bias[k] for k in range(5)], 1)
        torch.testing.assert_close(head(x), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(head(x, pre_logits=True), t.mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', TOKEN_HEADS)
def test_formats_and_order_of_tokens_change_nothing(name):
    torch.manual_seed(0)
    head = create_head(name, 16, 3).eval()
    x = torch.randn(2, 16, 3, 4)
    expected = head(x)
    for fmt, same in (('NHWC', x.permute(0, 2, 3, 1)), ('NLC', x.flatten(2).transpose(1, 2)[:, torch.randperm(12)])):
        head.input_fmt = fmt
        torch.testing.assert_close(head(same), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', TOKEN_HEADS)
def test_reset_keeps_the_attention_and_drops_it_when_asked(name):
    torch.manual_seed(0)
    head = create_head(name, 16, 3).double().eval()
    before = {key: value.clone() for key, value in head.hidden.state_dict().items()}
    x = torch.randn(2, 16, 3, 4).double()
    head.reset(7)
    assert head(x).shape == (2, 7) and head(x).dtype == torch.float64 and not head.fc.training
    assert all(torch.equal(value, before[key]) for key, value in head.hidden.state_dict().items())
    head.reset(0)
    assert torch.equal(head(x), head(x, pre_logits=True)) and head(x).shape == (2, head.hidden_size)
    head.reset(4, reset_other=True)
    torch.testing.assert_close(head(x), head.fc(x.mean((2, 3))))
    assert head.hidden_size == 16


@pytest.mark.parametrize('name', TOKEN_HEADS)
@pytest.mark.parametrize('backbone', [
    'test_resnet', 'test_vit', 'test_convnext', 'swin_tiny_patch4_window7_224', 'mixer_s32_224',
    'vit_base_patch16_siglip_224', 'vit_small_patch14_reg4_dinov2'])
def test_on_backbones_with_a_map_or_tokens(name, backbone):
    model = timm_spinal.attach_head(timm.create_model(backbone, device='meta'), name, num_classes=5).train()
    x = torch.zeros(2, *model.pretrained_cfg['input_size'], device='meta')
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert model.attached_head.in_features == model.num_features


def test_a_model_with_two_classifiers_gives_neither_map_nor_tokens():
    with pytest.raises(ValueError, match="deit_tiny_distilled_patch16_224 gives no map.*such as 'pspinal'"):
        timm_spinal.attach_head(timm.create_model('deit_tiny_distilled_patch16_224', device='meta'), 'attn')


@pytest.mark.parametrize('name', TOKEN_HEADS)
def test_script_and_fx(name):
    torch.manual_seed(0)
    head = create_head(name, 16, 3).eval()
    x = torch.randn(2, 16, 3, 4)
    for form in (torch.jit.script(head), torch.fx.symbolic_trace(head, concrete_args=dict(pre_logits=False))):
        torch.testing.assert_close(form(x), head(x))
    plain = create_head(name, 16, 3).eval()
    plain.reset(3, reset_other=True)
    torch.testing.assert_close(torch.jit.script(plain)(x), plain(x))


@pytest.mark.parametrize('name', TOKEN_HEADS)
def test_bfloat16_by_autocast_and_by_weights(name):
    torch.manual_seed(0)
    head = create_head(name, 16, 3).eval()
    x = torch.randn(2, 16, 3, 4)
    expected = head(x)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = head(x)
    assert mixed.dtype == torch.bfloat16
    for low in (mixed, head.bfloat16()(x.bfloat16())):
        torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('name, options, message', [
    ('attn', dict(reduction=3), 'reduction .3. must divide the 16 channels'),
    ('attn', dict(queries=0), 'queries must be a positive whole number'),
    ('attn', dict(norm='layernorm'), "Unknown norm 'layernorm'"),
    ('attn', dict(prefix='mean'), "Unknown prefix 'mean'; use drop, keep"),
    ('attn', dict(input_fmt='LNC'), "Unknown input_fmt 'LNC'"),
    ('mldecoder', dict(dim=20), r'num_heads \(8\) must divide dim \(20\)'),
    ('mldecoder', dict(dropout=1.), r'dropout must lie in \[0, 1\)'),
])
def test_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_head(name, 16, 3, **options)


def test_queries_have_no_weight_decay():
    model = timm_spinal.attach_head(timm.create_model('test_vit'), 'attn', num_classes=5)
    of_vit = timm.create_model('test_vit').no_weight_decay()
    assert 'cls_token' in of_vit and model.no_weight_decay() == {*of_vit, 'attached_head.hidden.queries'}
    without = {id(p) for group in param_groups_weight_decay(model, 0.1, True, model.no_weight_decay())
               for p in group['params'] if not group['weight_decay']}
    head = model.attached_head
    assert id(head.hidden.queries) in without and id(head.hidden.value.weight) not in without
    assert create_head('mldecoder', 16, 3).no_weight_decay() == set()
    resnet = timm_spinal.attach_head(timm.create_model('test_resnet'), 'attn', num_classes=5)
    assert resnet.no_weight_decay() == {'attached_head.hidden.queries'}


def test_every_token_head_is_a_row():
    assert [name for name, cls in HEADS.items() if issubclass(cls, TokenHead)] == TOKEN_HEADS
