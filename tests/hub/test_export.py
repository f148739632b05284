"""Exports: the files answer as eager mode does for any batch, and carry what an image needs before the model."""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.hub import export
from timm_spinal.hub.export import FORMATS, PREPROCESSING, ExportFailed, export_model
from timm_spinal.hub.export_cli import file_stem, find_names, load, make_table, markdown

pytest.importorskip('onnxscript')
onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')


def metadata(file) -> dict:
    return {prop.key: json.loads(prop.value) for prop in onnx.load(file).metadata_props}


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('name', ['spinalcnn_a1', 'vgg5_pspinal'])
def test_small_nets(name, kind, tmp_path):
    done = export_model(load(name, False), kind, tmp_path / f'x{FORMATS[kind].suffix}', name)
    assert done.difference <= 1e-5 and done.megabytes == pytest.approx(done.file.stat().st_size / 1e6, rel=0.01)
    assert list(tmp_path.iterdir()) == [done.file]


@pytest.mark.slow
@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('name', [
    'spinalcnn_a2', 'vgg5_spinal', 'test_vit_spinal', 'test_resnet_pspinal', 'test_resnet_caps', 'test_resnet_xnodr',
    'test_resnet_xnidr', 'test_resnet_attn', 'test_vit_attn', 'test_vit_mldecoder', 'test_resnet_mlp',
    'icresnet20_cifar', 'resnet18_sb_s32u1'])
def test_one_of_every_head_and_convolution(name, kind, tmp_path):
    assert export_model(load(name, False), kind, tmp_path / f'x{FORMATS[kind].suffix}', name).difference <= 1e-4


def test_trained_run_as_onnx(trained, tmp_path, capsys):
    """By the command line: any batch in onnxruntime, the accuracy's own preprocessing in the metadata."""
    assert main(['export', f'local-dir:{trained}', '--format', 'onnx', '--output', str(tmp_path / 'new')]) == 0
    file = tmp_path / 'new' / 'run.onnx'
    assert capsys.readouterr().out.startswith(f'{file}: 0.1 MB, differs from eager mode by at most ')
    facts = metadata(file)
    assert facts['architecture'] == 'spinalcnn_a1' and facts['input_size'] == [1, 28, 28]
    assert facts['mean'] == [0.1307] and facts['std'] == [0.3081] and facts['interpolation'] == 'bilinear'
    assert facts['label_names'] == list('0123456789') and facts['crop_pct'] == 1.0
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 28, 28)
        (logits,) = session.run(['logits'], {'image': x.numpy()})
        np.testing.assert_allclose(logits, model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_trained_run_as_torch_export(trained, tmp_path):
    """Loaded where timm_spinal was never imported."""
    assert main(['export', f'local-dir:{trained}', '--format', 'torch-export', '--output', str(tmp_path)]) == 0
    code = (f'import json, sys, torch; extra = {{{PREPROCESSING!r}: ""}}\n'
            f'run = torch.export.load({str(tmp_path / "run.pt2")!r}, extra_files=extra).module()\n'
            'x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(3))\n'
            f'facts = json.loads(extra[{PREPROCESSING!r}])\n'
            'print(json.dumps([run(x).tolist(), facts, "timm_spinal" in sys.modules]))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ))
    logits, facts, ours = json.loads(done.stdout)
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    torch.testing.assert_close(torch.tensor(logits), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert facts['mean'] == [0.1307] and facts['label_names'][9] == '9' and not ours


class Odd(nn.Module):
    """What an export cannot follow, or follows wrongly."""
    pretrained_cfg = dict(architecture='odd', input_size=(1, 4, 4), mean=(0.5,), std=(0.5,))
    in_chans, num_classes = 1, 2

    def __init__(self, how: str, scale: float = 1.):
        super().__init__()
        self.how, self.scale = how, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, :2] * self.scale
        if self.how == 'branches' and x.sum() > 0:
            return -x
        if self.how == 'differs' and torch.compiler.is_compiling():
            return x * (1 + 1e-3)
        return x


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('scale', [1., 1e-20])
def test_a_difference_is_found_whatever_the_scale(kind, scale, tmp_path):
    """A thousandth, also of logits as small as those of untrained capsules."""
    with pytest.raises(ExportFailed, match='odd: differs from eager mode by 1.0e-03 of the greatest logit for 1 image'):
        export_model(Odd('differs', scale), kind, tmp_path / f'x{FORMATS[kind].suffix}', 'odd')
    assert list(tmp_path.iterdir()) == []
    assert export_model(Odd('', scale), kind, tmp_path / f'x{FORMATS[kind].suffix}', 'odd').difference < 1e-6


@pytest.mark.parametrize('kind', FORMATS)
def test_what_does_not_export_leaves_the_old_file(kind, tmp_path):
    file = tmp_path / f'x{FORMATS[kind].suffix}'
    file.write_text('old')
    with pytest.raises(ExportFailed, match=f'odd: does not export to {kind} \\(') as error:
        export_model(Odd('branches'), kind, file, 'odd')
    assert '\n' not in str(error.value) and file.read_text() == 'old' and list(tmp_path.iterdir()) == [file]


def test_bad_input(tmp_path, capsys, monkeypatch):
    (tmp_path / 'file').write_text('')
    for argv, text in (
            (['export', 'nonsense'], "unknown model 'nonsense'"),
            (['export', 'nonsense*'], "no model of this package matches 'nonsense*'"),
            (['export', 'spinalcnn_a1', '--format', 'tflite'], "invalid choice: 'tflite'"),
            (['export', f'local-dir:{tmp_path}'], 'no such folder, or no config.json in it'),
            (['export', 'spinalcnn_a1', '--table', 'x.txt'], 'unknown format; name a .csv file'),
            (['export', 'spinalcnn_a1', '--output', str(tmp_path / 'file')], 'cannot be written'),
            (['export'], 'the following arguments are required: MODEL'),
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert text in err and err.startswith('error: ') and err.count('\n') == 1
    monkeypatch.setitem(FORMATS, 'onnx', export.Format('.onnx', ('no_such_package',), *[lambda *a: None] * 2))
    with pytest.raises(UserError, match=r"--format onnx: no_such_package is not installed; pip install 'timm-spinal"):
        export_model(Odd(''), 'onnx', tmp_path / 'x.onnx', 'odd')


def test_table_goes_on_where_it_was(tmp_path, capsys):
    file = tmp_path / 'table.csv'
    rows = make_table(['spinalcnn_a1'], ['torch-export'], file)
    assert rows[0]['outcome'] == 'exports' and list(tmp_path.iterdir()) == [file]
    text = file.read_text().replace('exports', 'a reason of old')
    file.write_text(text)
    assert main(['export', 'spinalcnn_a1', 'spinalcnn_plain', '--format', 'torch-export', '--table', str(file)]) == 1
    with file.open() as f:
        outcomes = {row['model']: row['outcome'] for row in csv.DictReader(f)}
    assert outcomes == {'spinalcnn_a1': 'a reason of old', 'spinalcnn_plain': 'exports'}
    assert '| `spinalcnn_a1` | a reason of old |' in capsys.readouterr().out


def test_markdown():
    rows = [dict(model='a', format='onnx', outcome='exports', difference='1.0e-07'),
            dict(model='a', format='torch-export', outcome='why', difference='')]
    assert markdown(rows).splitlines() == [
        '| model | onnx | torch-export |', '|---|---|---|', '| `a` | yes (1.0e-07) | why |']


def test_names():
    assert find_names(['spinalcnn_*', 'spinalcnn_a1', 'resnet18']) == [
        *timm_spinal.list_models('spinalcnn_*'), 'resnet18']
    assert [file_stem(n) for n in ('vgg5', 'local-dir:a/b', 'hf-hub:me/x.y@v1')] == ['vgg5', 'b', 'x.y_v1']
