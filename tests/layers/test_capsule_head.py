"""The capsule heads as classifiers: counts, reset, pre-logits, scripting, tracing, exporting, precision."""

import copy
import pickle

import pytest
import timm
import torch

import timm_spinal
from timm_spinal.layers import HEADS, create_head, head_options

CAPSULE_HEADS = [name for name, head in HEADS.items() if 'primary' in head_options(name)]
_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_KEYS = [
    *[f'hidden.block.{name}.{key}' for i in '123' for name, keys in ((f'conv{i}', ('weight', 'bias')), (
        f'norm{i}', _NORM)) for key in keys],
    *[f'{norm}.{key}' for norm in ('hidden.norm', 'scores.norm') for key in _NORM],
    'fc.weight',
]
KEYS = dict(caps=_KEYS, xnodr=_KEYS, xnidr=_KEYS)  # of a state dict on a ResNet, see tests/models/test_contract.py


def make(name='xnodr', in_features=16, num_classes=3, **kwargs):
    torch.manual_seed(0)
    return create_head(name, in_features, num_classes, **{'capsules': 4, **kwargs})


def image_map(batch=4, **kwargs):
    return torch.randn(batch, 16, 5, 5, generator=torch.Generator().manual_seed(1), **kwargs)


def live(head):
    """Statistics as after training, so that scores are not near zero."""
    for _ in range(3):
        head.train()(image_map(16))
    for m in head.modules():
        if hasattr(m, 'running_var'):
            m.momentum = None
            m.reset_running_stats()
    head(image_map(16))
    return head.eval()


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_papers_counts(name):
    def count(*args, **kwargs):
        return sum(p.numel() for p in create_head(name, *args, device='meta', **kwargs).parameters())

    assert count(1280, 10) == 1_490_992
    assert count(2048, 10, primary='bottleneck') == 4_793_392
    assert count(1280, 10, logit_scale=True) == 1_490_992 + 2


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_scores_are_lengths_of_normed_class_capsules(name):
    head = live(make(name))
    x = image_map()
    v = head.fc(head(x, pre_logits=True).reshape(4, 4, 8))
    norm = head.scores.norm
    normed = ((v - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias).relu()
    torch.testing.assert_close(head(x), normed.square().sum(2).sqrt())
    assert norm.weight.shape == (16,) and (head(x) >= 0).all() and head(x).max() > 1e-3


def test_learned_scale_and_shift_start_as_the_identity_and_get_gradients():
    plain, scaled = live(make()), live(make(logit_scale=True))
    x = image_map()
    torch.testing.assert_close(scaled(x), plain(x))
    with torch.no_grad():
        scaled.scores.scale.fill_(3.)
        scaled.scores.shift.fill_(-1.)
    torch.testing.assert_close(scaled(x), 3. * plain(x) - 1.)
    scaled(x).square().sum().backward()
    assert scaled.scores.scale.grad.abs() > 0 and scaled.scores.shift.grad.abs() > 0


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_reset(name):
    head = live(make(name))
    x = image_map()
    pre_logits = head(x, pre_logits=True)
    assert pre_logits.shape == (4, head.hidden_size) and head.hidden_size == 32
    head.reset(0)
    assert torch.equal(head(x), pre_logits)
    assert {n.split('.')[0] for n, _ in head.named_parameters()} == {'hidden'}  # nothing without a gradient
    head.reset(5)
    assert head(x).shape == (4, 5) and head.fc.out_features == 5
    assert torch.equal(head(x, pre_logits=True), pre_logits)
    head.reset(2, in_features=24)
    assert head(torch.randn(4, 24, 5, 5)).shape == (4, 2)
    head.reset(7, reset_other=True, in_features=16)
    assert [n for n, _ in head.named_parameters()] == ['fc.weight', 'fc.bias']
    torch.testing.assert_close(head(x), head.fc(x.mean((2, 3))))
    head.reset(1)  # a linear can
    assert head(x).shape == (4, 1)


def test_a_single_class_is_refused_before_anything_changes():
    head = make()
    state = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="at least 2, got num_classes 1; use 2 classes, or the head 'linear'"):
        head.reset(1)
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
    with pytest.raises(ValueError, match='at least 2'):
        make(num_classes=1)


def test_nhwc():
    head = live(make())
    last = make(input_fmt='NHWC').eval()
    last.load_state_dict(head.state_dict())
    x = image_map()
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), head(x))
    last.reset(2, reset_other=True)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), last.fc(x.mean((2, 3))))


def test_vector_capsules_read_a_pooled_vector():
    head = make(primary='vector', capsules=0, in_features=24).eval()
    assert not head.needs_feature_map and head.hidden_size == 24
    assert head(torch.randn(2, 24)).shape == (2, 3)


@pytest.mark.parametrize('name', CAPSULE_HEADS)
@pytest.mark.parametrize('primary', ['depthwise', 'bottleneck'])
def test_every_parameter_gets_a_finite_gradient(name, primary):
    for x in (image_map(), torch.zeros(4, 16, 5, 5)):
        head = make(name, primary=primary, capsules=0, logit_scale=True).train()
        head(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('name', CAPSULE_HEADS)
@pytest.mark.parametrize('primary, fmt', [('depthwise', 'NCHW'), ('bottleneck', 'NHWC')])
def test_script_trace_compile_export(name, primary, fmt):
    def image(batch):
        return image_map(batch) if fmt == 'NCHW' else image_map(batch).permute(0, 2, 3, 1).contiguous()

    head = make(name, primary=primary, capsules=0, input_fmt=fmt, logit_scale=True).eval()
    x = image(4)
    expected = head(x)
    scripted = torch.jit.script(head)
    torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(scripted(x, pre_logits=True), head(x, pre_logits=True))
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(head))
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.jit.script(traced)(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend='aot_eager')(x), expected)
    with torch.no_grad():
        exported = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},)).module()
    torch.testing.assert_close(exported(image(9)), head(image(9)))


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_training_step_compiles(name):
    head, x = make(name).train(), image_map()
    copied = copy.deepcopy(head)
    head(x).square().sum().backward()
    torch._dynamo.reset()
    torch.compile(copied, fullgraph=True, backend='aot_eager')(x).square().sum().backward()
    for p, q in zip(head.parameters(), copied.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_onnx_runtime_agrees(tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    x = image_map()
    for name in CAPSULE_HEADS:
        head = live(make(name))
        path = tmp_path / f'{name}.onnx'
        torch.onnx.export(head, (x,), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), head(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', CAPSULE_HEADS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(name, dtype):
    head = live(make(name))
    x = image_map()
    expected = head(x)
    with torch.autocast('cpu', dtype=dtype):
        low = head(x)
    # a sign that flips on rounding moves a score of a binary layer
    torch.testing.assert_close(low.float(), expected, atol=0.1 if name == 'caps' else 0.5, rtol=0.1)
    assert head.to(dtype)(x.to(dtype)).dtype == dtype


def test_copies():
    head = live(make('xnidr'))
    x = image_map()
    assert torch.equal(copy.deepcopy(head)(x), head(x))
    again = pickle.loads(pickle.dumps(head))
    again.reset(2)
    assert again(x).shape == (4, 2)


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_last_two_parameters_hold_the_routing_weight(name):
    """timm's AGC leaves the last two alone."""
    names = [n for n, _ in make(name, logit_scale=True).named_parameters()]
    assert names[-4:] == ['scores.shift', 'scores.norm.weight', 'scores.norm.bias', 'fc.weight']


def test_meta_device():
    head = create_head('xnidr', 16, 3, device='meta', logit_scale=True)
    assert all(t.device.type == 'meta' for t in [*head.parameters(), *head.buffers()])
    head.reset(4)
    assert head(torch.zeros(2, 16, 4, 4, device='meta')).shape == (2, 4)


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_learns_many_classes(name):
    """With the papers' epsilon behind the routing the loss stays at ln 200 = 5.3."""
    head = make(name, in_features=64, num_classes=200, primary='vector', capsules=0, logit_scale=True).train()
    assert head.scores.norm.eps == pytest.approx(1e-3 * 20. ** -6)
    assert make(name, num_classes=10).scores.norm.eps == make(name, num_classes=3).scores.norm.eps == 1e-3
    x, target = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)), torch.arange(32)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(head(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.


@pytest.mark.parametrize('name', CAPSULE_HEADS)
def test_tokens_are_capsules_after_a_projection(name):
    """By hand: a linear for each token, squash, batch norm over the capsules' axis, ReLU; without the prefix tokens."""
    torch.manual_seed(0)
    head = create_head(name, 16, 3, primary='tokens', capsules=5, input_fmt='NLC', num_prefix_tokens=2).eval()
    x = torch.randn(4, 7, 16)
    projected = x[:, 2:] @ head.hidden.block.proj.weight.T + head.hidden.block.proj.bias
    norm = projected.square().sum(-1, keepdim=True)
    squashed = projected * norm.sqrt() / (1 + norm)
    primary = (squashed / (1 + head.hidden.norm.eps) ** 0.5).relu()
    torch.testing.assert_close(head(x, pre_logits=True), primary.flatten(1))
    torch.testing.assert_close(head(x), head.scores(head.fc(primary)))
    torch.testing.assert_close(torch.jit.script(head)(x), head(x))
    head.reset(2, reset_other=True)
    torch.testing.assert_close(head(x), head.fc(x[:, 2:].mean(1)))


@pytest.mark.parametrize('primary, input_fmt', [('tokens', 'NCHW'), ('depthwise', 'NLC')])
def test_a_block_for_another_input_is_refused(primary, input_fmt):
    with pytest.raises(ValueError, match=f"primary='{primary}' does not read {input_fmt}"):
        create_head('caps', 16, 3, primary=primary, input_fmt=input_fmt)


@pytest.mark.parametrize('backbone, tokens', [('test_vit', 100), ('mixer_s32_224', 49)])
def test_on_models_of_tokens(backbone, tokens):
    model = timm_spinal.attach_head(timm.create_model(backbone, device='meta'), 'xnidr', num_classes=3)
    x = torch.zeros(2, *model.pretrained_cfg['input_size'], device='meta')
    assert model(x).shape == (2, 3) and model.attached_head.hidden.capsules == tokens
    model.reset_classifier(0)
    assert model(x).shape == (2, tokens * 8)
