"""What is published beside plain runs: pairs of digits, packed and merged models, a run of a comparison."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from timm.models import save_for_hf

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.compare.runs import Comparison, write_comparison
from timm_spinal.errors import UserError
from timm_spinal.hub.package import FILES
from timm_spinal.hub.publication import open_run
from timm_spinal.hub.reference_runs import result_rows
from timm_spinal.training.train import train

from ..training.images import make_mnist
from .conftest import REPO, digits_config, files, new_cache, send

pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """A run on two-digit images, and its data folder."""
    folder = tmp_path_factory.mktemp('pairs')
    make_mnist(folder / 'data', train=60, test=20)
    train(digits_config(
        folder, model='spinalcnn_plain_xnodr', dataset='multimnist', data_dir=str(folder / 'data'), img_size=36,
        test_split='test', loss='margin', epochs=1, train_num_samples=64, val_num_samples=32))
    return folder


def test_pairs_have_exact_pairs_in_their_card(hub, pairs, capsys):
    assert send(pairs / 'run') == 0
    result = json.loads((pairs / 'run' / 'result.json').read_text())
    text = files(hub)['README.md'].decode()
    data = ModelCard(text).data
    stated = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    titles = dict(exact='exact pairs accuracy', digit='digits accuracy', top2='top-2 accuracy')
    assert stated == {(split, title): round(result[f'{prefix}{name}'] / 100, 6) for name, title in titles.items()
                      for split, prefix in (('test', 'test_'), ('validation', ''))}
    assert 'assigns two of them to every image' in text and 'their softmax is not a probability' in text
    assert f'exact pairs {result["test_exact"]:.2f} %, digits {result["test_digit"]:.2f} %' in text
    assert main(['verify', REPO, '--data-dir', str(pairs / 'data'), '--workers', '0']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f'{REPO}: exact pairs on test is {result["test_exact"]:.2f} %, as the card says ' \
                   f'({result["test_exact"]:.2f} %)'


def test_packed_model(hub, pairs, tmp_path, monkeypatch, capsys):
    """The folder of `timm-spinal pack`: no run, no accuracy; the same scores as the float model."""
    assert main(['pack', str(pairs / 'run'), '--output', str(tmp_path / 'packed')]) == 0
    assert send(tmp_path / 'packed') == 0
    assert set(files(hub)) == set(FILES) - {
        'train_hparams.yaml', 'summary.csv', 'curves.png', 'confusion.png', 'worst.png'}
    text = files(hub)['README.md'].decode()
    assert 'published without the run that made them' in text and 'No accuracy of exactly these weights' in text
    assert '`head_packed=True`' in text and main(['verify', REPO]) == 0
    new_cache(monkeypatch, tmp_path / 'user')
    packed = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    model = timm.create_model(f'local-dir:{pairs / "run"}', pretrained=True).eval()
    x = torch.randn(4, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('form, architecture', [
    (timm_spinal.merge_bases, 'resnet18'), (timm_spinal.fold_bases, 'resnet18_sb_s32u1')])
def test_merged_and_folded_models(hub, tmp_path, monkeypatch, form, architecture):
    torch.manual_seed(0)
    model = form(timm.create_model('resnet18_sb_s32u1', num_classes=3).eval())
    save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True)
    assert send(tmp_path / 'saved') == 0
    assert json.loads(files(hub)['config.json'])['architecture'] == architecture
    new_cache(monkeypatch, tmp_path / 'user')
    again = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and again(x).shape == (2, 3)


def test_folder_without_a_run_has_one_form_of_its_weights(hub, run, tmp_path, capsys):
    (tmp_path / 'saved').mkdir()
    for name in ('model.safetensors', 'config.json'):
        shutil.copy(run / name, tmp_path / 'saved')
    assert send(tmp_path / 'saved', '--weights', 'ema') == 2
    assert 'is not a run folder (no args.yaml in it) and has only one set of weights' in capsys.readouterr().err


# ---- beside the other runs of a comparison ----------------------------------------------------------------------


@pytest.fixture
def comparison(trained, tmp_path):
    """A sweep's folder of three variants and two seeds; the teacher of `wld` is another run for each seed."""
    top1 = dict(linear=(70., 72.), spinal=(80., 84.), wld=(90., 91.))
    for variant, values in top1.items():
        for seed, value in enumerate(values):
            folder = Path(shutil.copytree(trained, tmp_path / 'compare' / 'runs' / variant / f'seed-{seed}'))
            change(folder / 'args.yaml', yaml.safe_load, yaml.safe_dump, seed=seed,
                   kd_model_name=f'{tmp_path}/compare/runs/linear/seed-{seed}' if variant == 'wld' else None)
            change(folder / 'result.json', json.loads, json.dumps, top1=value, test_top1=value - 1, test_top5=99.,
                   test_images=100)
    write_comparison(tmp_path / 'compare', Comparison('sweep', '', list(top1), 'linear', [0, 1, 2]))
    return tmp_path / 'compare'


def change(path, read, write, **values):
    path.write_text(write(dict(read(path.read_text()), **values)))


def test_rows_of_a_comparison_are_its_variants(hub, comparison):
    mine = comparison / 'runs' / 'wld' / 'seed-1'
    metric, rows, recipe = result_rows(open_run(mine), (str(comparison),))
    assert metric == 'test top-1' and recipe == ['kd_model_name']
    assert [row.published for row in rows] == [True, False, False]
    assert [(row.label, row.values) for row in rows] == [
        ('wld', {1: 90., 0: 89.}), ('linear', {0: 69., 1: 71.}), ('spinal', {0: 79., 1: 83.})]
    assert send(mine, '--beside', str(comparison)) == 0
    text = files(hub)['README.md'].decode()
    assert '| **wld** | 13,818 | 0, 1 | 89.50 +- 0.71 |' in text
    assert '| linear | 13,818 | 0, 1 | 70.00 +- 1.41 |' in text
    assert 'those of seed 1, the best of the 2 on the split that chose the epoch' in text
    assert 'There is only one seed' not in text
    assert send(comparison / 'runs' / 'wld' / 'seed-0', '--beside', str(comparison)) == 0
    assert 'those of seed 0, number 2 of the 2' in files(hub)['README.md'].decode()
    assert str(comparison).encode() not in b''.join(files(hub).values()), 'no path of this machine'


def test_runs_of_other_recipes(comparison):
    """By their models where that tells them apart, and the card names what else is different."""
    for i, options in enumerate((dict(lr=0.5), dict(model_kwargs=dict(head_width=10, head_layers=2), lr=0.5))):
        change(comparison / 'runs' / 'spinal' / f'seed-{i}' / 'args.yaml', yaml.safe_load, yaml.safe_dump, **options)
    first, second, third = (comparison / 'runs' / name for name in ('linear/seed-0', 'spinal/seed-1', 'spinal/seed-0'))
    table = result_rows(open_run(first), (str(second),))
    assert [row.label for row in table.rows] == ['spinalcnn_a1', 'spinalcnn_a1 head_layers=2 head_width=10']
    assert table.recipe == ['lr']
    table = result_rows(open_run(first), (str(third),))
    assert [row.label for row in table.rows] == ['lr=0.004', 'lr=0.5']


def test_runs_that_cannot_stand_beside_it(comparison, run):
    with pytest.raises(UserError, match='the published run is not one of this comparison; give run folders'):
        result_rows(open_run(run), (str(comparison),))
    first, second = (str(comparison / 'runs' / name / 'seed-0') for name in ('linear', 'spinal'))
    with pytest.raises(UserError, match='--beside: two runs of spinalcnn_a1 have seed 0; leave one out'):
        result_rows(open_run(Path(first)), (second,))
