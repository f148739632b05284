"""What heads on a pooled vector share: reset, pre-logits, scripting, tracing, compiling, exporting, precision."""

import copy
import pickle

import pytest
import torch

from timm_spinal.layers import HEADS, create_head

pytestmark = pytest.mark.parametrize('name', [name for name, head in HEADS.items() if not head.needs_feature_map])


def make(name: str, in_features: int = 13, num_classes: int = 3, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_head(name, in_features, num_classes, **kwargs)


def test_reset_keeps_hidden_layers(name):
    head = make(name).eval()
    x = torch.randn(4, 13)
    pre_logits = head(x, pre_logits=True)
    head.reset(0)
    assert torch.equal(head(x), pre_logits)
    head.reset(5)
    assert head(x).shape == (4, 5)
    assert torch.equal(head(x, pre_logits=True), pre_logits)
    assert pre_logits.shape[1] == head.hidden_size == head.fc.in_features


def test_reset_other_leaves_a_linear(name):
    head = make(name)
    head.reset(5, reset_other=True)
    assert [n for n, _ in head.named_parameters()] == ['fc.weight', 'fc.bias']
    assert head.hidden_size == head.fc.in_features == 13


def test_reset_for_another_width(name):
    head = make(name)
    head.reset(2, in_features=21)
    assert head(torch.randn(4, 21)).shape == (4, 2)
    assert head.in_features == 21


def test_reset_keeps_mode_device_dtype(name):
    head = make(name, device='meta', dtype=torch.float64).eval()
    head.reset(4, in_features=20)
    assert all(p.device.type == 'meta' and p.dtype == torch.float64 for p in head.parameters())
    assert not any(m.training for m in head.modules())


def test_last_parameters_are_the_classifier(name):
    assert [n for n, _ in make(name).named_parameters()][-2:] == ['fc.weight', 'fc.bias']


def test_every_parameter_gets_a_finite_gradient(name):
    head = make(name)
    head(torch.zeros(4, 13)).square().sum().backward()  # an all-zero input too
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_script_trace_compile_export(name):
    head = make(name).eval()
    x = torch.randn(4, 13)
    expected = head(x), head(x, pre_logits=True)
    scripted = torch.jit.script(head)
    assert torch.equal(scripted(x), expected[0])
    assert torch.equal(scripted(x, pre_logits=True), expected[1])
    traced = torch.fx.symbolic_trace(head, concrete_args={'pre_logits': False})
    assert torch.equal(traced(x), expected[0])
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), expected[0])
    batch = torch.export.Dim('batch', min=2)
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(9, 13)
    torch.testing.assert_close(exported(more), head(more))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    head = make(name).eval()
    x = torch.randn(4, 13)
    with torch.autocast('cpu', dtype=dtype):
        low = head(x)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), head(x), atol=0.05, rtol=0.05)


def test_copies(name):
    head = make(name).eval()
    x = torch.randn(4, 13)
    assert torch.equal(copy.deepcopy(head)(x), head(x))
    again = pickle.loads(pickle.dumps(head))
    again.reset(2, in_features=17)
    assert again(torch.randn(4, 17)).shape == (4, 2)
