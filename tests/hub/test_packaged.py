"""Weights inside the package: what is claimed is there, loads without a network and has the accuracy of its card."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.hub import packaged
from timm_spinal.hub.card import install_line
from timm_spinal.hub.card_check import check_card
from timm_spinal.hub.golden import golden_tensors
from timm_spinal.hub.measure import TOLERANCE, evaluation
from timm_spinal.hub.options import PublishOptions
from timm_spinal.hub.packaged import install
from timm_spinal.hub.publication import open_run
from timm_spinal.hub.scores import stated_accuracy
from timm_spinal.models._packaged import FOLDER, packaged_names, read_info
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.train import train
from timm_spinal.validate import validate
from timm_spinal.version import ADDRESS

from ..training.images import data_of
from .conftest import digits_config

ROOT = Path(timm_spinal.__file__).parents[1]
CARDS = ROOT / 'hub_cards'
OPTIONS = PublishOptions('', licence='mit')


@pytest.fixture(scope='module')
def clone(trained, tmp_path_factory):
    """A source tree with the digits run installed as `spinalcnn_a1.digits`, and nothing else."""
    root = tmp_path_factory.mktemp('clone')
    shutil.copy(ROOT / 'pyproject.toml', root)
    left_out = shutil.ignore_patterns('__pycache__', '*.safetensors', '*.json')
    shutil.copytree(ROOT / 'timm_spinal', root / 'timm_spinal', ignore=left_out)
    assert install(open_run(trained), OPTIONS, 'digits', root) == 'spinalcnn_a1.digits'
    return root


def in_clone(root: Path, code: str) -> str:
    done = subprocess.run([sys.executable, '-c', f'import json, torch, timm, timm_spinal\n{code}'],
                          env=dict(os.environ, PYTHONPATH=str(root), HF_HUB_OFFLINE='1'), cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_installed_weights_load_by_name_without_a_network(clone, trained):
    out = in_clone(clone, '''
model = timm.create_model('spinalcnn_a1.digits', pretrained=True).eval()
other = timm.create_model('spinalcnn_a1.digits', pretrained=True, num_classes=3, in_chans=3)
maps = timm.create_model('spinalcnn_a1', pretrained=True, features_only=True)(torch.zeros(1, 1, 28, 28))
x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
print(json.dumps(dict(
    logits=model(x).tolist(), other=list(other(torch.zeros(1, 3, 28, 28)).shape), maps=len(maps),
    names=timm_spinal.list_models('spinalcnn_a1*', pretrained=True), mean=model.pretrained_cfg['mean'],
    plain=timm.is_model_pretrained('spinalcnn_plain'), head=timm.get_pretrained_cfg('spinalcnn_a1_mlp'))))''')
    found = json.loads(out)
    model = timm.create_model(f'local-dir:{trained}', pretrained=True)
    expected = golden_tensors(model, (1, 28, 28))['logits']
    torch.testing.assert_close(torch.tensor(found['logits']), expected)
    assert found['other'] == [1, 3] and found['maps'] == 3 and found['mean'] == [0.1307] and not found['plain']
    assert found['names'] == ['spinalcnn_a1.digits'] and found['head'] is None


def test_card_of_installed_weights(clone):
    text = (clone / 'hub_cards' / 'spinalcnn_a1.digits.md').read_text()
    check_card(text)
    assert "timm.create_model('spinalcnn_a1.digits', pretrained=True)" in text and 'hf-hub' not in text
    info = json.loads((clone / 'timm_spinal' / 'weights' / 'spinalcnn_a1.digits.json').read_text())
    assert info['recipe']['dataset'] == 'digits' and info['config']['pretrained_cfg']['license'] == 'mit'


@pytest.mark.slow
def test_default_tag_has_the_preprocessing_of_the_architecture(clone, tmp_path):
    """Of two tags the one with the architecture's own mean and std, though its name comes later; else none."""
    train(digits_config(tmp_path, epochs=1, mean=[0.5], std=[0.5]))
    install(open_run(tmp_path / 'run'), OPTIONS, 'another', clone)
    names = "timm.list_models('spinalcnn_a1*', pretrained=True)"
    code = f"print(json.dumps([timm.get_pretrained_cfg('spinalcnn_a1').tag, {names}, " \
           "timm.get_pretrained_cfg('spinalcnn_a1').mean, timm.get_pretrained_cfg('spinalcnn_a1.another').mean]))"
    both = ['spinalcnn_a1.another', 'spinalcnn_a1.digits']
    assert json.loads(in_clone(clone, code)) == ['digits', both, [0.1307], [0.5]]
    (clone / 'timm_spinal' / 'weights' / 'spinalcnn_a1.digits.json').rename(tmp_path / 'aside')
    assert json.loads(in_clone(clone, code)) == [None, both[:1], [0.1307], [0.5]]
    (tmp_path / 'aside').rename(clone / 'timm_spinal' / 'weights' / 'spinalcnn_a1.digits.json')


@pytest.mark.slow
def test_head_of_a_combination_that_is_not_in_the_table(clone, tmp_path):
    train(digits_config(tmp_path, epochs=1, model='spinalcnn_plain_pspinal', model_kwargs={}))
    assert install(open_run(tmp_path / 'run'), OPTIONS, 'digits', clone) == 'spinalcnn_plain_pspinal.digits'
    out = in_clone(clone, """model = timm.create_model('spinalcnn_plain_pspinal.digits', pretrained=True)
print(model.attached_head.fc.weight.sum().item(), timm.list_models('*plain_*', pretrained=True))""")
    number, names = out.split(' ', 1)
    wanted = load_file(tmp_path / 'run' / 'model.safetensors')['attached_head.fc.weight'].sum().item()
    assert float(number) == pytest.approx(wanted) and "'spinalcnn_plain_pspinal.digits'" in names


def test_card_of_weights_that_are_not_published(run, clone, tmp_path, capsys):
    """The card alone, which claims no tag; not of what is in the package."""
    options = replace(OPTIONS, card_only=True)
    root = tmp_path / 'clone'
    root.mkdir()
    (root / 'pyproject.toml').write_text('')
    assert install(open_run(run), options, 'later', root) == 'spinalcnn_a1.later'
    text = (root / 'hub_cards' / 'spinalcnn_a1.later.md').read_text()
    check_card(text)
    assert 'These weights are not published yet' in text and 'spinalcnn_a1.later\', pretrained' not in text
    assert "timm.create_model('local-dir:RUN', pretrained=True)" in text and not (root / 'timm_spinal').exists()
    with pytest.raises(UserError, match='the weights of spinalcnn_a1.digits are in the package'):
        install(open_run(run), options, 'digits', clone)
    assert main(['publish', str(run), '--repo', 'me/x', '--card-only']) == 2
    assert '--card-only: works only with --local' in capsys.readouterr().err


def test_what_is_not_installed(run, tmp_path, monkeypatch):
    source = open_run(run)
    with pytest.raises(UserError, match='is not a clone of the repository'):
        install(source, OPTIONS, 'digits', tmp_path)
    (tmp_path / 'pyproject.toml').write_text('')
    (tmp_path / 'timm_spinal').mkdir()
    for tag in ('a.b', 'backbone_digits'):
        with pytest.raises(UserError, match=f"'{tag}': it is not a valid tag"):
            install(source, OPTIONS, tag, tmp_path)
    monkeypatch.setattr(packaged, 'MOST_EACH', 10_000)
    with pytest.raises(UserError, match='0.1 MB beside 0.0 MB of others; the package takes'):
        install(source, OPTIONS, 'digits', tmp_path)
    monkeypatch.undo()
    train(digits_config(tmp_path / 'wide', epochs=1, model_kwargs=dict(head_width=10)))
    with pytest.raises(UserError, match="was trained with options .*head_width.* train it without them"):
        install(open_run(tmp_path / 'wide' / 'run'), OPTIONS, 'wide', tmp_path)
    assert not (tmp_path / 'hub_cards').exists() and not (tmp_path / 'timm_spinal' / 'weights').exists()


# ---- what this package ships ------------------------------------------------------------------------------------


def test_no_tag_claims_weights_that_are_not_there():
    """Every tag is a file of this package, or weights of the backbone: such a file, or timm's own."""
    for name in timm_spinal.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        tag = name.partition('.')[2]
        if cfg.file:
            whole = Path(cfg.file).stem
            assert Path(cfg.file).is_file() and whole in packaged_names()
            assert name == whole or tag == f'backbone_{whole.partition(".")[2]}'
        else:
            assert tag.startswith('backbone') and str(cfg.hf_hub_id or cfg.url).startswith(('timm/', 'http')), name
    assert {path.stem for path in FOLDER.glob('*.safetensors')} == set(packaged_names())
    assert {path.stem for path in FOLDER.glob('*.json')} == set(packaged_names())


@pytest.mark.parametrize('name', sorted({name.partition('.')[0] for name in packaged_names()}))
def test_bare_name_loads_whole_weights(name, caplog):
    """Not the backbone's alone beside a new head, where the package has both."""
    new = timm.get_pretrained_cfg(name)
    with caplog.at_level('WARNING'):
        model = timm.create_model(name, pretrained=True)
    found, tag = model.state_dict(), model.pretrained_cfg['tag']
    assert f'{name}.{tag}' in timm_spinal.list_models(pretrained='whole')
    if new.tag is None:  # packaged weights want another preprocessing than a new model of the name, and bring theirs
        assert not new.has_weights and model.pretrained_cfg['mean'] != new.mean
    expected = load_file(FOLDER / f'{name}.{tag}.safetensors')
    assert caplog.text == '' and found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in found.items())


def test_whole_weights_are_listed():
    every, whole = timm_spinal.list_models(pretrained=True), timm_spinal.list_models(pretrained='whole')
    assert whole == [name for name in every if not name.partition('.')[2].startswith('backbone')]
    assert set(whole) == set(packaged_names()) and len(every) > len(whole) > 0
    assert timm_spinal.list_models('spinalcnn_plain_xnodr*', pretrained='whole') == ['spinalcnn_plain_xnodr.mnist']
    with pytest.raises(ValueError, match="pretrained must be True, False or 'whole', got 'half'"):
        timm_spinal.list_models(pretrained='half')


def test_every_packaged_weight_has_a_card_and_every_card_its_weights():
    cards = {path.stem: path.read_text() for path in CARDS.glob('*.md') if path.stem != 'README'}
    assert set(packaged_names()) <= set(cards)
    for name, text in cards.items():
        check_card(text)
        assert name in packaged_names() or 'are not published yet' in text
        assert f'Install `timm_spinal` {install_line(ADDRESS)}.\n' in text
        assert f'`RuntimeError: Unknown model ({name.rpartition(".")[0]})`' in text


def test_sizes():
    sizes = [path.stat().st_size for path in FOLDER.glob('*.safetensors')]
    assert max(sizes, default=0) <= packaged.MOST_EACH and sum(sizes) <= packaged.MOST_TOGETHER


def test_a_build_holds_weights_and_template(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path), 'build_py', '--build-lib',
               str(tmp_path / 'lib')]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    built = {path.name: path.read_bytes() for path in (tmp_path / 'lib' / 'timm_spinal' / 'weights').iterdir()}
    assert built == {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert (tmp_path / 'lib' / 'timm_spinal' / 'hub' / 'card_template.md').is_file()


@pytest.mark.parametrize('name', packaged_names())
def test_packaged_weights_answer_as_they_did(name):
    info = read_info(name)
    model = timm.create_model(name, pretrained=True)
    golden = golden_tensors(model, tuple(info['config']['pretrained_cfg']['input_size']))
    torch.testing.assert_close(golden['logits'], torch.tensor(info['logits']), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', packaged_names())
def test_packaged_weights_adapt_as_timms_do(name):
    model = timm.create_model(name, pretrained=True).eval()
    chans, height, width = model.pretrained_cfg['input_size']
    x = torch.randn(2, chans, height, width, generator=torch.Generator().manual_seed(0))
    other = timm.create_model(name, pretrained=True, num_classes=3).eval()
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x))
    assert other(x).shape == (2, 3)
    colour = timm.create_model(name, pretrained=True, in_chans=4 - chans, num_classes=0).eval()
    assert colour(torch.zeros(1, 4 - chans, height, width)).ndim == 2
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()(x)
    assert len(maps) >= 3 and all(len(m) == 2 for m in maps)


@pytest.mark.slow
@pytest.mark.parametrize('name', packaged_names())
def test_packaged_weights_have_the_accuracy_of_their_card(name, tmp_path):
    """The whole test set, from the shipped file, where the data are there."""
    recipe = TrainConfig(**read_info(name)['recipe'])
    where = SimpleNamespace(data_dir=str(data_of(recipe, tmp_path)), dataset='', dataset_download=False, batch_size=250,
                            workers=0)
    config, split = evaluation(recipe, Path('unused'), where)
    config.model = name
    name, stated = stated_accuracy(check_card((CARDS / f'{config.model}.md').read_text()), split)
    assert validate(config)[0][name] == pytest.approx(stated, abs=TOLERANCE)
