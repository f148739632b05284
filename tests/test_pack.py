"""`timm-spinal pack`, and packed files where float ones belong."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from timm_spinal.cli import main
from timm_spinal.layers import xnor_backend

from .training.images import make_folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder as timm or a run writes it, with class names."""
    folder = tmp_path_factory.mktemp('float')
    torch.manual_seed(0)
    model = timm.create_model('capsnet_mnist', head='xnodr', num_classes=5).eval()
    torch.nn.init.normal_(model.head.fc.weight, 0., 0.5)
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=list('abcde'))
    save_for_hf(model, str(folder), safe_serialization=True, model_config=dict(label_names=list('abcde')))
    return folder


@pytest.fixture(scope='module')
def packed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('packed') / 'new'
    assert main(['pack', str(run), '--output', str(folder)]) == 0
    return folder


def test_pack_a_folder(run, packed, tmp_path, capsys):
    assert main(['pack', f'local-dir:{run}', '-o', str(tmp_path / 'again')]) == 0
    out, err = capsys.readouterr()
    assert err == ''
    assert 'capsule layer: 1,310,720 bytes float, 204,800 packed: 6.40 times smaller' in out
    assert '16 of 16 predictions on noise are the same' in out
    config = json.loads((packed / 'config.json').read_text())
    assert config['model_args']['head_packed'] and config['label_names'] == list('abcde')
    a, b = (timm.create_model(f'local-dir:{folder}', pretrained=True).eval() for folder in (run, packed))
    x = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(b(x), a(x), atol=1e-5, rtol=1e-5)
    assert (packed / 'model.safetensors').stat().st_size < (run / 'model.safetensors').stat().st_size
    again = load_file(tmp_path / 'again' / 'model.safetensors')
    assert all(torch.equal(again[k], v) for k, v in load_file(packed / 'model.safetensors').items())


def test_validate_says_what_computed_the_bits(run, packed, tmp_path, capsys, monkeypatch):
    """Float layers are computed by torch, packed ones by the C code or, where that is switched off, by its twin."""
    data, best = str(make_folder(tmp_path / 'images', classes='abcde', size=28)), xnor_backend()
    in_c = 'torch' if best == 'torch' else f'c-{best}'
    for i, (folder, variable, expected) in enumerate((
            (run, 'auto', 'torch'), (packed, 'auto', in_c), (packed, 'torch', 'torch'))):
        monkeypatch.setenv('TIMM_SPINAL_XNOR', variable)
        file = tmp_path / f'{i}.json'
        assert main(['validate', '--model', f'local-dir:{folder}', '--data-dir', data, '--workers', '0',
                     '--results-file', str(file)]) == 0
        row, = json.loads(file.read_text())
        assert row['xnor'] == expected and f'images/s, binary layers by {expected}' in capsys.readouterr().out


def test_one_answer_for_all_images_is_said(run, tmp_path, capsys):
    """Scores that no image changes, in place of those of the folder that is packed elsewhere without the warning."""
    model = timm.create_model(f'local-dir:{run}', pretrained=True)
    torch.nn.init.zeros_(model.head.scores.norm.weight)
    torch.nn.init.ones_(model.head.scores.norm.bias)
    save_for_hf(model, str(tmp_path / 'same'), safe_serialization=True)
    for folder, count in ((tmp_path / 'same', 1), (run, 0)):
        assert main(['pack', str(folder), '-o', str(tmp_path / f'packed{count}')]) == 0
        out = capsys.readouterr().out
        assert out.count(f'warning: {folder} gives the same answer for all 16 noise images') == count == \
            out.count('warning')


def test_a_name_without_weights_is_said_to_be_untrained(tmp_path, capsys):
    assert main(['pack', 'test_resnet_xnodr', '-o', str(tmp_path / 'new')]) == 0
    assert capsys.readouterr().err == 'test_resnet_xnodr: a model name without weights; its head is untrained\n'


def error(argv, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith('error: ') and sum(line.startswith('error') for line in err) == 1
    return err[-1]


def test_bad_input(run, packed, tmp_path, capsys):
    new = str(tmp_path / 'new')
    assert f'--output {run} exists already; name a new folder' in error(['pack', str(run), '-o', str(run)], capsys)
    assert 'is packed already' in error(['pack', str(packed), '-o', new], capsys)
    assert 'has no capsule head' in error(['pack', 'test_resnet', '-o', new], capsys)
    assert 'Only a layer with one binarised' in error(['pack', 'test_resnet_caps', '-o', new], capsys)
    assert 'unknown model' in error(['pack', 'nonsense', '-o', new], capsys)
    assert 'has no config.json' in error(['pack', str(tmp_path), '-o', new], capsys)
    assert not (tmp_path / 'new').exists()


def test_weights_of_the_other_form_are_refused_in_one_line(run, packed, tmp_path, capsys):
    five, four = (str(make_folder(tmp_path / classes, classes=classes, size=28)) for classes in ('abcde', 'abcd'))
    model = ['--model', 'capsnet_mnist', '--workers', '0', '--checkpoint']
    for folder, kwargs, message in (
            (packed, ['head=xnodr'], 'packed capsule weights do not fit a float model; create it with head_packed'),
            (run, ['head=xnodr', 'head_packed=True'], 'float capsule weights do not fit a packed model'),
    ):
        argv = ['validate', *model, str(folder / 'model.safetensors'), '--data-dir', five, '--num-classes', '5']
        assert message in error([*argv, '--model-kwargs', *kwargs], capsys)
    argv = ['validate', *model, str(packed / 'model.safetensors'), '--data-dir', four, '--num-classes', '4']
    message = error([*argv, '--model-kwargs', 'head=xnodr', 'head_packed=True'], capsys)
    assert 'the packed weights are for 5 classes, the model has 4; create it with num_classes=5' in message
    message = error(['train', '--model', f'local-dir:{packed}', '--data-dir', five], capsys)
    assert 'is packed and can only be used for inference; train the float model and pack it afterwards' in message
