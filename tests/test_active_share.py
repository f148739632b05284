"""`timm-spinal active-share`."""

import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.training.model import check_model_name

from .training.images import make_folder


def shares(out):
    return [float(line.split()[-2]) for line in out.splitlines() if line.endswith(' %')]


def test_a_new_model(capsys):
    assert main(['active-share', 'icresnet20_cifar', '--count', '8']) == 0
    out = capsys.readouterr().out
    assert len(shares(out)) == 18 and all(0 < share < 100 for share in shares(out))
    assert out.splitlines()[0].startswith('stages.1.0.conv1 ') and out.rstrip().endswith('active at some positions')


def test_dead_layers_are_said(capsys):
    argv = ['active-share', 'icresnet18', '--img-size', '64', '--count', '4', '--model-kwargs', 'ic_scale=raw',
            'ic_init=4608']
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert '16 of them never or always active' in out and set(shares(out)) == {0.}


def test_a_folder_with_images(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model('icresnet20_cifar', num_classes=2)
    model.stages[1][0].conv1.ic_weight.data.fill_(1000.)
    save_for_hf(model, str(tmp_path / 'run'), safe_serialization=True)
    make_folder(tmp_path / 'images')
    found = []
    for images in ([], ['--images', str(tmp_path / 'images' / 'train')]):
        assert main(['active-share', str(tmp_path / 'run'), '--count', '5', *images]) == 1
        out = capsys.readouterr().out
        assert '1 of them never or always active' in out and shares(out)[0] == 0.
        found.append(shares(out))
    assert found[0] != found[1]


def test_a_relative_folder_as_people_have_it(tmp_path, capsys, monkeypatch):
    root = make_folder(tmp_path / 'images') / 'train'
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        assert main(['active-share', 'icresnet20_cifar', '--images', 'images/train']) == 0
        found.append(capsys.readouterr().out.splitlines())
        (root / '.cache').mkdir(exist_ok=True)
        (root / '.cache' / 'x.png').write_bytes(b'no image')
    assert found[1] == ['images/train: skipped 1 hidden (.cache)', *found[0]]


@pytest.mark.parametrize('argv, text', [
    (['resnet18'], 'ResNet has no IC convolution'),
    (['icresnet20_cifr'], "unknown model 'icresnet20_cifr'; the nearest are icresnet20_cifar"),
    (['some/where'], 'some/where: no such folder; a model on the Hub is hf-hub:some/where'),
    (['icresnet20_cifar', '--images', '/nowhere'], '--images /nowhere: no such folder'),
    (['icresnet20_cifar', '--count', '1'], "--count: '1' is too small; give at least 2"),
    (['icresnet20_cifar', '--cuont', '1'], 'unknown flag --cuont'),
])
def test_bad_input(argv, text, capsys):
    assert main(['active-share', *argv]) == 2
    out, err = capsys.readouterr()
    assert text in err and err.count('\n') == 1


def test_an_empty_folder(tmp_path, capsys):
    assert main(['active-share', 'icresnet20_cifar', '--images', str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f'error: --images {tmp_path}: ')


def test_a_path_without_prefix_is_one_line_for_the_other_verbs_too():
    with pytest.raises(UserError, match="model some/where: .*'local-dir:some/where'") as error:
        check_model_name('some/where')
    assert '\n' not in str(error.value)
