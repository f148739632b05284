"""Heat maps: by hand for a CNN, on every kind of model, where the stroke is, and what cannot be explained."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.see.explain import METHODS, class_index, explain
from timm_spinal.see.opened import Opened, open_any
from timm_spinal.training.pixels import Decoder

from .folders import make_detector, make_pictures, make_run

pytest.importorskip('pytorch_grad_cam')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('explain') / 'run')


@pytest.fixture
def image(tmp_path):
    return Image.open(make_pictures(tmp_path / 'p', 1, 80)[0]).convert('RGB')


def opened_from(model) -> Opened:
    data = resolve_model_data_config(model)
    mode = {1: 'L', 3: 'RGB'}[data['input_size'][0]]
    return Opened('it', model.eval(), [], Decoder(mode), create_transform(**data), data=data)


def test_gradcam_by_hand(run, image):
    opened = open_any(str(run))
    kept = {}

    def keep(module, args, out):
        out.retain_grad()
        kept['a'] = out

    opened.model.layer4.register_forward_hook(keep)
    scores = opened.model(opened.transform(image)[None].requires_grad_())
    (scores[0, 1] - scores[0, [0, 2]].logsumexp(0)).backward()
    weights = kept['a'].grad.mean((2, 3), keepdim=True)
    heat = F.relu((weights * kept['a']).sum(1))[0].detach()
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    found = explain(open_any(str(run)), image, 1)
    assert (found.label, found.layer) == ('bee', 'layer4')
    assert found.score == pytest.approx(scores.softmax(1)[0, 1].item())
    assert found.heat.shape == tuple(opened.data['input_size'][1:]) and found.image.size == found.heat.shape[::-1]
    small = F.interpolate(torch.from_numpy(found.heat)[None, None], heat.shape, mode='area')[0, 0]
    assert np.corrcoef(small.flatten(), heat.flatten())[0, 1] > 0.95
    predicted = explain(open_any(str(run)), image)
    assert predicted.label == opened.label(int(scores.argmax()))


@pytest.mark.parametrize('name, layer', [
    ('test_vit', 'blocks.5.norm1'), ('test_convnext', 'stages.3'), ('test_efficientnet_spinal', 'blocks.4'),
    ('test_resnet_caps', 'layer4'), ('vgg5_pspinal', ''), ('spinalcnn_a1', ''), ('icresnet20_cifar', ''),
    ('test_nfnet', ''), ('test_byobnet', ''), ('test_mambaout', ''),
])
def test_models(name, layer, image):
    timm_spinal.ensure_registered(name)
    torch.manual_seed(0)
    opened = opened_from(timm.create_model(name, num_classes=5))
    found = explain(opened, opened.decode(image, str), 2)
    assert found.label == '2' and np.isfinite(found.heat).all() and 0 <= found.heat.min() <= found.heat.max() <= 1
    assert found.layer == layer or not layer
    assert found.overlay().size == found.image.size == found.heat.shape[::-1]
    other = explain(opened, opened.decode(image, str), 3)
    assert found.heat.max() == 0 or not np.allclose(found.heat, other.heat)


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'swin_tiny_patch4_window7_224_spinal', 'vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224',
    'xcit_nano_12_p16_224', 'coatnet_nano_rw_224',
    'mobilenetv2_100_xnodr', 'resnet18_pspinal', 'capsnet_mnist', 'maxvit_pico_rw_256', 'pvt_v2_b0',
    'levit_128s', 'efficientformer_l1', 'eva02_tiny_patch14_224', 'beit_base_patch16_224',
])
def test_families(name, image):
    timm_spinal.ensure_registered(name)
    torch.manual_seed(0)
    opened = opened_from(timm.create_model(name, num_classes=5))
    found = explain(opened, opened.decode(image, str), 2)
    assert np.isfinite(found.heat).all() and found.heat.shape == tuple(opened.data['input_size'][1:])


@pytest.mark.parametrize('method', METHODS)
def test_methods(method, run, image):
    heats = np.stack([explain(open_any(str(run)), image, target, method).heat for target in range(3)])
    assert np.isfinite(heats).all() and heats.min() >= 0 and 0.99 < heats.max() <= 1


def test_heat_is_where_the_stroke_is():
    centres = []
    for x in (7, 19):
        stroke = np.zeros((28, 28), dtype=np.uint8)
        stroke[4:24, x - 1:x + 2] = 255
        found = explain(open_any('spinalcnn_a1.mnist'), Image.fromarray(stroke), method='layercam')
        centres.append((found.heat.sum(0) * np.arange(28)).sum() / found.heat.sum())
    assert centres[1] - centres[0] > 3


@pytest.mark.parametrize('head', ['xnodr', 'xnidr'])
def test_packed_head_is_explained_as_its_float_twin(head, tmp_path, image):
    run = make_run(tmp_path / 'run', f'test_resnet_{head}')
    assert main(['pack', str(run), '--output', str(tmp_path / 'packed')]) == 0
    twin, packed = open_any(str(run)), open_any(str(tmp_path / 'packed'))
    a, b = explain(twin, image, 1), explain(packed, image, 1)
    assert np.allclose(a.heat, b.heat, atol=1e-3) and a.score == pytest.approx(b.score, abs=1e-4)
    assert any(getattr(module, 'packed', False) for module in packed.model.modules())  # it stays as it was


def test_command(run, tmp_path, capsys):
    picture, = make_pictures(tmp_path / 'q', 1, 60)
    out = tmp_path / 'why.png'
    assert main(['explain', str(run), str(picture), '--output', str(out), '--class', 'BEE']) == 0
    assert capsys.readouterr().out.startswith('bee ')
    with Image.open(out) as sheet:
        assert sheet.width > 1.5 * sheet.height  # the picture, and beside it the heat
        pixels = np.asarray(sheet.convert('RGB'), dtype=int)
    left, right = pixels[10:230, 10:230], pixels[10:230, 240:460]
    assert (left != 255).any() and np.abs(left - right).mean() > 10
    assert class_index(open_any(str(run)), '1') == 1


@pytest.mark.parametrize('arguments, message', [
    (['RUN', 'none.png', '-o', 'o.png'], 'image none.png: cannot be read (there is no such file)'),
    (['RUN', 'a.png', '-o', 'o.png', '--class', 'beee'], '--class beee: is none of the 3 classes; there are bee'),
    (['RUN', 'a.png', '-o', 'o.png', '--class', '7'], '--class 7: is none of the 3 classes'),
    (['RUN', 'a.png', '-o', 'o.jpg'], '--output o.jpg: unknown format'),
    (['RUN', 'a.png', '-o', 'a.png'], 'is the image; name another file'),
    (['RUN', 'a.png', '-o', 'o.png', '--layer', 'layer5'], '--layer layer5: the model has no such module; layer4'),
    (['RUN', 'a.png', '-o', 'o.png', '--layer', 'global_pool'], 'has no places'),
    (['DETECTOR', 'a.png', '-o', 'o.png'], 'is a detector'),
    (['spinal_mlp', 'a.png', '-o', 'o.png'], 'model spinal_mlp'),
])
def test_bad_input(run, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / 'p', 1)[0].rename(tmp_path / 'a.png')
    if 'DETECTOR' in arguments:
        make_detector(tmp_path / 'detector')
    before = sorted(tmp_path.rglob('*'))
    places = dict(RUN=str(run), DETECTOR='detector')
    assert main(['explain', *(places.get(a, a) for a in arguments)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count('\n') == 1 and sorted(tmp_path.rglob('*')) == before


def test_model_without_a_map(image):
    opened = opened_from(timm.create_model('spinal_mlp'))
    with pytest.raises(timm_spinal.errors.UserError, match='has no places'):
        explain(opened, opened.decode(image, str))
