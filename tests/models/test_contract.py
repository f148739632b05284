"""What timm's own model tests do not catch, on a small model of every kind: each row of HEADS and of CONVOLUTIONS.

The functions that take ``name`` are the contract of any model of ours; tests/models/test_new_rows.py calls them for
rows that it makes itself.
"""

import importlib
import os
import statistics
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict, save_for_hf
from timm.optim import param_groups_layer_decay
from timm.utils import adaptive_clip_grad
from torch import nn

import timm_spinal
from timm_spinal import CONVOLUTIONS, HEADS
from timm_spinal.hub.papers import PAPERS

# one for each way of building a backbone, and nets of our own; then one for each head and convolution
FAMILIES = ('test_resnet_spinal', 'test_vit_pspinal', 'test_convnext_mlp', 'vgg5_spinal', 'spinalcnn_a1',
            'spinalcnn_a2')
MODELS = (
    *FAMILIES,
    *(f'test_resnet_{head}' for head in HEADS if not any(name.endswith(f'_{head}') for name in FAMILIES)),
    *(f'{prefix}test_resnet_spinal' for prefix in CONVOLUTIONS),
)


def make(name: str, **kwargs) -> nn.Module:
    assert timm_spinal.ensure_registered(name)
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


def image(model: nn.Module, batch: int = 2, **kwargs) -> torch.Tensor:
    return torch.randn(batch, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1), **kwargs)


@pytest.mark.parametrize('name', MODELS)
def test_safetensors_round_trip(name, tmp_path):
    """timm saves with safetensors' save_file, which refuses tensors that share memory."""
    model = make(name).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    saved = load_state_dict(str(tmp_path / 'model.safetensors'))
    assert saved.keys() == model.state_dict().keys()
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = image(model)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('scale', [0., 1e-4, 100.])
def test_gradients_are_finite(name, scale):
    model = make(name).train()
    F.cross_entropy(model(scale * image(model, 4)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('name', MODELS)
def test_last_two_parameters_are_the_classifier_that_agc_leaves_alone(name):
    """timm clips all but the last two parameters: the classifier is not clipped, all else is."""
    model = make(name)
    named = list(model.named_parameters())
    fc = dict(model.get_classifier().named_parameters())
    assert list(fc) in (['weight', 'bias'], ['weight'])  # that of capsules has no bias
    assert all(p is own for (_, p), own in zip(named[-len(fc):], fc.values()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    adaptive_clip_grad([p for _, p in named[:-2]], 0.01)
    assert all((p.grad == 1e3).all() for p in fc.values())
    assert all((p.grad.abs() < 1e3).all() for _, p in named[:-2])


@pytest.mark.parametrize('name', MODELS)
def test_layer_decay_leaves_the_head_at_full_rate(name):
    model = make(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    first = next(iter(model.parameters()))
    assert scale[id(first)] < 1.
    assert scale[id(model.get_classifier().weight)] == 1.
    assert len(scale) == len(list(model.parameters()))
    if hasattr(model, 'attached_head'):
        assert {scale[id(p)] for p in model.attached_head.parameters()} == {1.}


@pytest.mark.parametrize('name', MODELS)
def test_channels_last_gives_the_same(name):
    model = make(name).eval()
    x = image(model)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_compiles_without_graph_breaks(name):
    model = make(name).eval()
    x = image(model)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(x), expected)


@pytest.mark.slow
def test_compiles_with_inductor():
    model = make('vgg5_pspinal').eval()
    x = image(model)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_exports_with_a_free_batch(name):
    model = make(name).eval()
    x = image(model)
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    larger = image(model, 3)
    torch.testing.assert_close(exported(larger), model(larger))


@pytest.mark.parametrize('name', ['vgg5_spinal', 'test_resnet_pspinal'])
def test_onnx_runtime_agrees(name, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = make(name).eval()
    x = image(model)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', MODELS)
def test_meta_device_holds_everything(name):
    model = make(name, device='meta')
    assert all(t.device.type == 'meta' for t in [*model.parameters(), *model.buffers()])
    assert model(image(model).to('meta')).shape == (2, 5)


def test_distilled_models_give_one_answer_and_refuse_token_distillation():
    model = timm_spinal.attach_head(
        timm.create_model('deit_tiny_distilled_patch16_224', device='meta'), 'spinal', num_classes=5).train()
    assert model(image(model).to('meta')).shape == (2, 5)
    model.set_distilled_training(False)
    with pytest.raises(ValueError, match='deit_tiny_distilled_patch16_224_spinal has one head.*logit or feature'):
        model.set_distilled_training(True)


def layer_test(cls: type) -> object:
    """The file of tests/layers that tests the class of a row."""
    name = cls.__module__.removeprefix('timm_spinal.layers.')
    return importlib.import_module(f'tests.layers.test_{name}')


@pytest.mark.parametrize('head', HEADS)
def test_keys_of_a_head_do_not_change(head):
    """Published weights depend on these names."""
    plain = list(timm.create_model('test_resnet', num_classes=0, device='meta').state_dict())
    model = timm_spinal.attach_head(timm.create_model('test_resnet', device='meta'), head)
    assert list(model.state_dict()) == plain + [f'attached_head.{key}' for key in layer_test(HEADS[head]).KEYS[head]]


@pytest.mark.parametrize('prefix', CONVOLUTIONS)
def test_keys_of_a_convolution_do_not_change(prefix):
    row = CONVOLUTIONS[prefix]
    timm_spinal.ensure_registered(f'{prefix}test_resnet')
    plain = timm.create_model('test_resnet', device='meta')
    for options, keys in layer_test(row.layer).KEYS[prefix]:
        model = timm.create_model(f'{prefix}test_resnet', device='meta', **options)
        convs = [name for name, module in model.named_modules() if isinstance(module, row.layer)]
        added = {f'{conv}.{key}' for conv in convs for key in keys}
        assert set(model.state_dict()) == {*plain.state_dict(), *added} and convs and all(map(row.adds, added))


@pytest.mark.parametrize('prefix', CONVOLUTIONS)
def test_rows_of_convolutions(prefix):
    """Names that can be told apart, options that config.json can hold, and models that are there after the import."""
    row = CONVOLUTIONS[prefix]
    assert row.prefix == prefix and issubclass(row.layer, nn.Conv2d)
    assert all(name.startswith(f'{prefix}_') for name in row.options)
    assert all(isinstance(value, (str, int, float, bool)) for value in row.options.values())
    assert not timm.list_models(f'{prefix}*', exclude_filters=timm_spinal.list_models()), 'timm has such names itself'
    names = [f'{prefix}{backbone}' for backbone in row.backbones]
    assert set(names) <= set(timm_spinal.list_models())
    for name in names:
        model = timm.create_model(name, device='meta')
        assert any(isinstance(module, row.layer) for module in model.modules())


@pytest.mark.parametrize('cls', [*HEADS.values(), *(row.layer for row in CONVOLUTIONS.values())])
def test_every_row_has_a_layer_test_and_a_citation(cls):
    known = {paper.arxiv for paper in PAPERS}
    rows = (*HEADS.values(), *CONVOLUTIONS.values())
    papers = [row.paper for row in rows if cls in (row, getattr(row, 'layer', None))]
    assert layer_test(cls) and all(paper in known for paper in papers if paper)
    assert papers != [''] or cls.__module__.endswith('.control_heads')


def run_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, '-W', 'error::UserWarning', '-c', code], check=True, capture_output=True, text=True,
        env={**os.environ, **environment}).stdout


@pytest.mark.slow
def test_no_name_clashes_with_timm():
    out = run_python(
        'import timm; names = set(timm.list_models()); modules = set(timm.list_modules())\n'
        'import timm_spinal; ours = set(timm_spinal.list_models())\n'
        'assert names | ours == set(timm.list_models()), "timm lost a name"\n'
        'mine = set(timm.list_modules()) - modules\n'
        'assert ours == set(timm.list_models(module=mine)), "a model hides in a module of timm"\n'
        'print(len(ours), sorted(names & ours))')
    count, clashes = out.split(maxsplit=1)
    assert int(count) >= 42 and clashes.strip() == '[]'


@pytest.mark.slow
def test_import_adds_at_most_100_ms():
    """CPU time, so that other work on the machine does not count; median of fresh processes.

    The first writes bytecode, as an installation does, whatever the environment says of it.
    """
    code = 'import time, timm; start = time.process_time(); import timm_spinal; print(time.process_time() - start)'
    times = [float(run_python(code, PYTHONDONTWRITEBYTECODE='')) for _ in range(4)]
    assert statistics.median(times[1:]) <= 0.1, times


def test_token_model_made_without_classes_gives_its_embedding_until_it_gets_classes():
    """timm promises num_features of a vision transformer that is created without classes."""
    timm_spinal.ensure_registered('test_vit_pspinal')
    model = timm.create_model('test_vit_pspinal', num_classes=0).eval()
    x = image(model)
    plain = timm.create_model('test_vit', num_classes=0).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    width = model.num_features
    assert model.head_hidden_size == width
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.head_hidden_size == width + 4 * 200
    model.reset_classifier(0)
    assert model(x).shape == (2, width + 4 * 200)


def test_a_model_saved_without_classes_loads_back(tmp_path):
    model = make('test_resnet_pspinal').eval()
    model.reset_classifier(0)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = image(model)
    assert torch.equal(again(x), model(x)) and again.head_hidden_size == model.head_hidden_size
