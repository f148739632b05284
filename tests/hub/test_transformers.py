"""What is published, and run folders, in transformers: the same weights and the same answers, to the bit."""
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.hub.options import PublishOptions
from timm_spinal.hub.package import built
from timm_spinal.hub.publication import open_model, open_run
from timm_spinal.models._packaged import packaged_names
from timm_spinal.training.results import export_model

from .conftest import REPO, files, send

transformers = pytest.importorskip('transformers')
OPTIONS = PublishOptions('me/x', licence='mit')


@torch.no_grad()
def check_same(folder: Path) -> None:
    """The classifier and the embedding of a folder in transformers are those that timm makes of it."""
    ours = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    mine, found = ours.state_dict(), theirs.timm_model.state_dict()
    assert mine.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in mine.items())
    assert all(value.dtype == found[key].dtype for key, value in mine.items())
    x = torch.randn(2, *ours.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    # a copy lies in memory as timm's does: products in another alignment differ in the last bit
    assert torch.equal(copy.deepcopy(theirs)(x).logits, ours(x))
    embed = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0).eval()
    theirs = copy.deepcopy(transformers.AutoModel.from_pretrained(folder))
    found = theirs(x)
    assert torch.equal(found.pooler_output, embed(x)) and found.pooler_output.ndim == 2
    assert torch.equal(found.last_hidden_state, ours.forward_features(x))
    config = json.loads((folder / 'config.json').read_text())
    names = config.get('label_names')
    if names:
        assert list(transformers.AutoConfig.from_pretrained(folder).id2label.values()) == list(names)
    assert 'num_classes' not in config['model_args'] and config['num_classes'] == ours.num_classes


def new_model(name, **kwargs):
    """With statistics and weights that are not those of a start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for module in model.modules():
        if isinstance(getattr(module, 'running_var', None), torch.Tensor):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def test_run_folder(trained):
    check_same(trained)


@pytest.mark.parametrize('dtype', ['fp32', 'fp16'])
def test_package_of_a_run(trained, dtype):
    with built(open_run(trained), PublishOptions('me/x', licence='mit', dtype=dtype)) as package:
        check_same(package.folder)


@pytest.mark.parametrize('name, kwargs', [
    ('resnet18_xnodr', {}), ('resnet18_spinal', dict(head_width=20)), ('icresnet20_cifar', {}), ('spinal_mlp', {}),
    ('resnet32_sb_s16u1_cifar', {}), ('capsnet_mnist', {}), ('spinalcnn_a2', dict(in_chans=3)), ('test_convnext', {}),
    ('convnext_atto_caps', {}),
])
def test_package_of_a_model(name, kwargs):
    timm_spinal.ensure_registered(name)
    with built(open_model(new_model(name, **kwargs)), OPTIONS) as package:
        check_same(package.folder)


@pytest.mark.parametrize('name', packaged_names())
def test_packaged_weights(name, tmp_path):
    model = timm.create_model(name, pretrained=True)
    export_model(tmp_path, model, model.state_dict(), None, {})
    check_same(tmp_path)


@pytest.mark.parametrize('form', [timm_spinal.fold_bases, timm_spinal.merge_bases])
def test_folded_and_merged_bases(form):
    with built(open_model(form(new_model('resnet18_sb_s32u1'))), OPTIONS) as package:
        check_same(package.folder)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18_xnodr', 'mobilenetv2_100_xnidr'])
def test_packed_model(name, tmp_path):
    model = new_model(name)
    (tmp_path / 'float').mkdir()
    export_model(tmp_path / 'float', model, model.state_dict(), list('abcde'), {})
    assert main(['pack', str(tmp_path / 'float'), '--output', str(tmp_path / 'packed')]) == 0
    check_same(tmp_path / 'packed')
    assert json.loads((tmp_path / 'packed' / 'config.json').read_text())['model_args']['head_packed'] is True


def test_folder_that_timm_saved_is_mended_by_publishing(tmp_path):
    """timm writes the number of classes twice, with which transformers fails, and the pooling of the backbone."""
    save_for_hf(new_model('resnet18_xnodr'), str(tmp_path), safe_serialization=True)
    with pytest.raises(TypeError, match='num_classes'):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    with built(open_run(tmp_path), OPTIONS) as package:
        check_same(package.folder)


def test_pipeline(tmp_path):
    model = new_model('resnet20_cifar')
    export_model(tmp_path, model, model.state_dict(), list('abcde'), {})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    found = transformers.pipeline('image-classification', model=str(tmp_path))(image)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        scores = model(transform(image).unsqueeze(0)).softmax(-1)[0]
    assert {row['label']: row['score'] for row in found} == pytest.approx(dict(zip('abcde', scores.tolist())), abs=1e-6)


# ---- cards, as a user reads them --------------------------------------------------------------------------------


def in_a_fresh_process(code: str, hub, folder: Path) -> str:
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(folder / 'home'), PYTHONPATH=str(Path(__file__).parents[2]))
    for name in ('HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HF_TOKEN'):
        env.pop(name, None)
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=folder, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr


def blocks_of(card: str) -> str:
    return '\n'.join(re.findall(r'```python\n(.*?)```', card, re.DOTALL))


@pytest.mark.slow
def test_card_of_one_channel(hub, quick, run, tmp_path):
    """Its blocks run; without the import timm answers what it says; and pipeline does what it says."""
    assert send(run, '--branch', 'next') == 0
    card = files(hub, 'next')['README.md'].decode()
    assert f"from_pretrained('{REPO}', revision='next')" in card and 'pipeline(' not in card
    assert "transformers' `pipeline` makes 3 channels of every image and so cannot be used with these weights" in card
    Image.new('L', (30, 30), 77).save(tmp_path / 'image.png')
    code = blocks_of(card)
    check = f"""
torch.testing.assert_close(logits, model(image))
from transformers import pipeline
try:
    pipeline('image-classification', model='{REPO}', revision='next')('image.png')
except RuntimeError as e:
    print(e)"""
    assert 'to have 1 channels, but got 3 channels' in in_a_fresh_process(code + check, hub, tmp_path)
    answer = in_a_fresh_process(code.replace('import timm_spinal', '', 1), hub, tmp_path).splitlines()[-1]
    assert answer == 'RuntimeError: Unknown model (spinalcnn_a1)' and f'`{answer}`' in card


@pytest.mark.slow
def test_card_of_three_channels(hub, quick, tmp_path, monkeypatch):
    timm_spinal.register_head_variant('test_resnet', 'spinal')
    folder = tmp_path / 'saved'
    folder.mkdir()
    model = new_model('test_resnet_spinal')
    export_model(folder, model, model.state_dict(), list('abcde'), {})
    assert send(folder, '--pull-request') == 0
    card = files(hub, 'refs/pr/1')['README.md'].decode()
    assert f"pipeline('image-classification', model='{REPO}', revision='refs/pr/1')('image.png')" in card
    Image.new('RGB', (200, 180), (250, 120, 3)).save(tmp_path / 'image.png')
    check = """
scores = dict(zip('abcde', model(image).softmax(1)[0].tolist()))
assert all(abs(row['score'] - scores[row['label']]) < 1e-6 for row in answer) and len(answer) == 5
print('same')"""
    assert in_a_fresh_process(blocks_of(card) + check, hub, tmp_path).endswith('same\n')


def test_weights_of_a_published_file_are_those_of_the_run(hub, quick, run, tmp_path):
    assert send(run) == 0
    for name, data in files(hub).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    check_same(tmp_path)
    mine = load_file(run / 'model.safetensors')
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).timm_model.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in theirs.items())
