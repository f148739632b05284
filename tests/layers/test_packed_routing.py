"""Packed capsule heads: the same scores from bits, and nothing but inference."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from timm_spinal.layers import (
    CapsuleRouting,
    PackedXnidr,
    PackedXnodr,
    create_head,
    xnor_backend,
    xnor_implementation,
)
from timm_spinal.layers.xnor import library

from ..conftest import launch_env
from .test_capsule_head import image_map, live, make

BOTH = ('xnodr', 'xnidr')


def packed(head):
    head = copy.deepcopy(head)
    head.pack()
    return head


def tensor_bytes(module):
    return sum(t.nbytes for t in module.state_dict().values())


@pytest.mark.parametrize('backend', library.xnor_paths())
@pytest.mark.parametrize('name', BOTH)
@pytest.mark.parametrize('kwargs', [{}, dict(primary='bottleneck', capsules=0), dict(capsule_dim=12, class_dim=7)])
def test_scores_are_those_of_the_float_head(name, kwargs, backend, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT, backend)
    head = live(make(name, num_classes=30, **kwargs))
    x = image_map(12)
    expected = head(x)
    found = packed(head)(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.argmax(1), expected.argmax(1)) and expected.max() > 0.05


def test_size_of_the_papers_layer():
    layer = CapsuleRouting(128, 8, 10, xnor_projector=True)
    assert tensor_bytes(layer) == 655_360
    assert tensor_bytes(PackedXnodr(layer)) == 20_480 + 81_920  # bits and scales
    layer = CapsuleRouting(128, 8, 10, xnor_agreement=True)
    assert tensor_bytes(PackedXnidr(layer)) == 655_360  # floats


@pytest.mark.parametrize('name', BOTH)
def test_created_packed_takes_packed_weights(name):
    head = packed(live(make(name)))
    again = make(name, packed=True).eval()
    assert not torch.equal(again(image_map()), head(image_map()))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(image_map()), head(image_map()))
    assert [n for n, _ in head.named_parameters() if n.startswith('fc.')] == []
    assert isinstance(again.fc, PackedXnodr if name == 'xnodr' else PackedXnidr) and '4 x 8 -> 3 x 16' in repr(again.fc)


@pytest.mark.parametrize('name, tensor', [('xnodr', 'bits'), ('xnidr', 'projector')])
def test_weights_of_the_other_form_are_refused(name, tensor):
    head = live(make(name))
    ours = packed(head)
    before = copy.deepcopy(head.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match=f'^fc.{tensor}: packed .* float model; create it with head_packed=True'):
            head.load_state_dict(ours.state_dict(), strict=strict)
        with pytest.raises(ValueError, match=r'^fc.weight: float .* packed model; .* timm_spinal.pack_xnodr\(model\)'):
            ours.load_state_dict(before, strict=strict)
        with pytest.raises(ValueError, match=f'^fc.{tensor}: the packed weights are for 3 classes, the model has 5; '
                                             'create it with num_classes=3'):
            make(name, num_classes=5, packed=True).load_state_dict(ours.state_dict(), strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


def test_reset_of_a_packed_head():
    head = packed(live(make()))
    x = image_map()
    expected, pre_logits = head(x), head(x, pre_logits=True)
    with pytest.raises(ValueError, match='cannot be reset to 5 classes; create the model without head_packed'):
        head.reset(5)
    assert torch.equal(head(x), expected)
    head.reset(0)
    assert torch.equal(head(x), pre_logits)
    with pytest.raises(ValueError, match='cannot be reset to 3 classes'):
        head.reset(3)
    head.reset(5, reset_other=True)
    assert head(x).shape == (4, 5)


@pytest.mark.parametrize('head, message', [
    (lambda: packed(make()), "The head is packed already; give a trained float 'xnodr' or 'xnidr' head"),
    (lambda: make(num_classes=0), 'The head has no capsule layer'),
    (lambda: make('caps'), 'Only a layer with one binarised product can be packed'),
])
def test_what_cannot_be_packed(head, message):
    head = head()
    state = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=message):
        head.pack()
    assert head.state_dict().keys() == state.keys()


def test_capsfc_cannot_be_created_packed():
    with pytest.raises(ValueError, match="use the head 'xnodr' or 'xnidr'"):
        make('caps', packed=True)


@pytest.mark.parametrize('backend', library.xnor_paths())
@pytest.mark.parametrize('name', BOTH)
def test_script_trace_compile_export(name, backend, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT, backend)
    head = packed(live(make(name)))
    x = image_map()
    with torch.no_grad():
        expected = head(x)
        torch.testing.assert_close(torch.jit.script(head)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(torch.nn.Sequential(head))(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(head, fullgraph=True, backend='aot_eager')(x), expected)
        exported = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
        assert f'{name}_routing' in str(exported.graph)
        torch.testing.assert_close(exported.module()(image_map(9)), head(image_map(9)))


@pytest.mark.slow
@pytest.mark.parametrize('name', BOTH)
def test_inductor(name):
    head, x = packed(live(make(name))), image_map()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(head, fullgraph=True)(x), head(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', BOTH)
def test_copies_types_and_meta(name):
    head, x = packed(live(make(name))), image_map()
    expected = head(x)
    assert torch.equal(copy.deepcopy(head)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(head))(x), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(head(x).float(), expected, atol=0.5, rtol=0.1)
    torch.testing.assert_close(copy.deepcopy(head).double()(x.double()).float(), expected, atol=1e-5, rtol=1e-5)
    assert copy.deepcopy(head).half()(x.half()).dtype == torch.float16
    meta = create_head(name, 16, 3, packed=True, capsules=4, device='meta')
    assert all(t.device.type == 'meta' for t in [*meta.parameters(), *meta.buffers()])
    assert meta(torch.zeros(2, 16, 4, 4, device='meta')).shape == (2, 3)


@pytest.mark.slow
def test_unpickled_in_a_fresh_process(tmp_path):
    """Where nothing packed was made before."""
    head, x = packed(live(make())), image_map()
    torch.save((head, x, head(x).detach()), tmp_path / 'head.pt')
    code = (f'import torch, timm_spinal\n'
            f'head, x, expected = torch.load({str(tmp_path / "head.pt")!r}, weights_only=False)\n'
            f'assert torch.allclose(head(x), expected, atol=1e-6)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=launch_env(), timeout=100)
    assert done.returncode == 0, done.stderr


def test_implementation_of_a_model(monkeypatch):
    """A packed layer on the CPU is computed by the C code where it takes its sizes, a float one by torch."""
    best = xnor_backend()
    in_c = 'torch' if best == 'torch' else f'c-{best}'
    for name in BOTH:
        assert xnor_implementation(make(name)) == {'xnor': 'torch'}
        head = packed(live(make(name)))
        assert xnor_implementation(head) == {'xnor': in_c}
        assert xnor_implementation(copy.deepcopy(head).to('meta')) == {'xnor': 'torch'}
        assert xnor_implementation(copy.deepcopy(head).double()) == {'xnor': 'torch'}
        assert xnor_implementation(packed(live(make(name, class_dim=7)))) == {'xnor': 'torch'}
        monkeypatch.setenv(library.ENVIRONMENT, 'torch')
        assert xnor_implementation(head) == {'xnor': 'torch'}
        monkeypatch.delenv(library.ENVIRONMENT)
    for head in (make('caps'), make(num_classes=0), torch.nn.Linear(3, 2)):
        assert xnor_implementation(head) == {}


def test_training_is_refused():
    head = packed(live(make())).train()
    with pytest.raises(RuntimeError, match='train the float model and pack it afterwards'):
        head(image_map()).sum().backward()
