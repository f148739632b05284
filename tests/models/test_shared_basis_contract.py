"""What timm's own model tests do not catch, on models with shared bases (the list is that of test_contract.py)."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict, save_for_hf
from timm.optim import param_groups_layer_decay

MODELS = {
    'resnet18_sb_s32u1': dict(sb_double=True, sb_rank=16),
    'resnet50_sbpp': dict(layers=(2, 2, 2, 2)),
    'mobilenetv2_100_sbpp': {},
}
IDS = list(MODELS)


@pytest.fixture(params=IDS)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=5, **MODELS[request.param]).eval()


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_safetensors_round_trip(model, tmp_path):
    """timm saves with safetensors' save_file, which refuses tensors that share memory."""
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert load_state_dict(str(tmp_path / 'model.safetensors')).keys() == model.state_dict().keys()
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


@pytest.mark.slow
def test_compiles_without_graph_breaks(model):
    expected = model(images())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(images()), expected)


@pytest.mark.slow
def test_exports_with_a_free_batch(model):
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(images(3)), model(images(3)))


def test_channels_last_gives_the_same(model):
    expected = model(images())
    model = model.to(memory_format=torch.channels_last)
    got = model(images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_and_whole(model):
    F.cross_entropy(model.train()(100. * images(4)), torch.tensor([0, 1, 2, 3])).backward()
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all() and (p.grad.any() or 'basis_norm.bias' in name), name


def test_layer_decay_has_each_parameter_once(model):
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert len(scale) == len(list(model.parameters())) == sum(len(group['params']) for group in groups)
    for stage in model.shared_stages().values():
        first = next(stage[1].parameters())
        assert all(scale[id(basis)] == scale[id(first)] < 1. for basis in stage.bases())


@pytest.mark.slow
def test_onnx_runtime_agrees(tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = timm.create_model('resnet18_sb_s32u1', num_classes=5).eval()
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (images(),), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images()), rtol=1e-3, atol=1e-4)
