"""Model cards: made from run folders, checked without a network, and true."""
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from timm_spinal.cost import Cost, cost_of
from timm_spinal.errors import UserError
from timm_spinal.hub.card import make_card, resolve_licence
from timm_spinal.hub.card_check import check_card
from timm_spinal.hub.options import PublishOptions
from timm_spinal.hub.papers import CAPSULES, IC, PROGRESSIVE, SHARED_BASIS, SPINAL, XNODR, papers_of
from timm_spinal.hub.publication import open_run
from timm_spinal.hub.recipe import base_model, command, dataset_name, hparams_yaml, hub_dataset, shared_options
from timm_spinal.hub.reference_runs import ModelResults, result_rows, table
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.parser import parse_config
from timm_spinal.version import ADDRESS

OPTIONS = PublishOptions('me/digits', licence='mit')
COST = Cost(13818, 488_040, 7_200, (1, 28, 28))


def card_of(source, options=OPTIONS):
    return make_card(source, options, COST, options.repo, f'hf-hub:{options.repo}')


@pytest.fixture(scope='module')
def card(trained):
    return card_of(open_run(trained))


def test_metadata_is_what_the_run_gave(card, trained):
    source = open_run(trained)
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'mit')
    assert data.tags == ['timm', 'timm-spinal', 'image-classification', 'spinalnet', 'arxiv:2007.03347']
    values = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    assert values == {('validation', 'top-1 accuracy'): round(source.result['top1'] / 100, 6),
                      ('validation', 'top-5 accuracy'): round(source.result['top5'] / 100, 6)}
    assert check_card(card).eval_results == data.eval_results


def test_data_set_by_another_name(trained):
    text = card_of(open_run(trained), replace(OPTIONS, dataset_name='Digits (8 x 8)'))
    assert {r.dataset_name for r in ModelCard(text).data.eval_results} == {'Digits (8 x 8)'}
    assert 'trained on Digits (8 x 8) with' in text and '- Digits (8 x 8), validation' in text


def test_text_names_cost_and_what_was_measured(card, trained):
    source = open_run(trained)
    for part in ('**Parameters (M):** 0.0138', '**GMACs:** 0.000488', '**Activations (M):** 0.0072',
                 '**Image size:** 1 x 28 x 28', f'top-1 {source.result["top1"]:.2f} %', 'this split chose the epoch',
                 'an MLP with as many parameters, to compare with', 'There is only one seed', 'Seed 5, 2 epochs'):
        assert part in card, part


def test_command_and_options_repeat_the_run(card, trained):
    """The command line of the card and the published YAML parse to the run's own config."""
    args = open_run(trained).args
    line = re.search(r'## Recipe\n\n```\n(.*?)\n```', card, re.DOTALL)[1].replace('\\\n', '').split()
    assert line[:4] == ['accelerate', 'launch', '-m', 'timm_spinal.train']
    assert shared_options(parse_config(line[4:])) == shared_options(args)
    assert yaml.safe_load(hparams_yaml(args)) == shared_options(args)


def test_command_with_every_kind_of_option():
    config = TrainConfig(
        model='vgg5', data_dir='/home/somebody/pets', model_kwargs=dict(head_width=7, a='x y'), scale=[0.5, 1.0],
        mean=[0.5], smoothing=0.0, output='/elsewhere', mixed_precision='bf16', class_map='../map.txt')
    text = command(config, 4)
    assert text.startswith('accelerate launch --num_processes 4 -m timm_spinal.train --data-dir pets')
    assert '/home' not in text and '/elsewhere' not in text and "'a=x y'" in text
    import shlex
    again = parse_config(shlex.split(text.replace('\\\n', ''))[6:])
    assert shared_options(again) == shared_options(config)
    assert '--scale' not in command(replace(config, no_aug=True), 1), 'has no effect, and would be refused'


def test_first_code_block_runs(trained, tmp_path, monkeypatch):
    """The blocks of a card of a folder on the disk, executed as they stand."""
    source = open_run(trained)
    text = make_card(source, OPTIONS, COST, 'me/digits', f'local-dir:{trained}')
    Image.new('RGB', (40, 30), (250, 10, 10)).save(tmp_path / 'image.png')
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        exec(block, names)
    assert names['top'].shape == (1, 5) and names['embedding'].shape == (1, 48) and len(names['maps']) == 3


def test_install_line_is_one_constant(card, trained, monkeypatch):
    assert ADDRESS == '', 'the package is in no index'
    line = next(line for line in card.splitlines() if line.startswith('Install `timm_spinal`'))
    assert line.startswith('Install `timm_spinal` from a clone of its source (`pip install .` there).')
    assert 'pip install timm' not in card and 'pypi' not in card.lower()
    monkeypatch.setattr('timm_spinal.hub.card.ADDRESS', 'a-name')
    assert 'Install `timm_spinal` with `pip install a-name`.' in card_of(open_run(trained))


@pytest.mark.slow
def test_what_timm_answers_without_the_import(card, trained):
    """In another process, which never imports this package; `tests/hub/test_transformers.py` does it for the Hub."""
    code = f"import timm; timm.create_model('local-dir:{trained}', pretrained=True)"
    err = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr.splitlines()[-1]
    assert err == 'RuntimeError: Unknown model (spinalcnn_a1)' and f'raises `{err}`' in card
    source = open_run(trained)
    source.config['architecture'] = 'resnet18'  # one that timm knows by itself
    assert 'Unknown model' not in card_of(source)


@pytest.mark.parametrize('old, new, text', [
    ('---\nlibrary_name', 'library_name', 'has no metadata'),
    ('license: mit\n', '', 'no licence'),
    ('license: mit', 'license: mti', "licence 'mti' is not a licence id of the Hub; did you mean mit?"),
    ('library_name: timm', 'library_name: torch', "library_name is 'torch'; it must be timm"),
    ('pipeline_tag: image-classification', 'pipeline_tag: x', "pipeline_tag is 'x'"),
    ('- timm-spinal\n', '', 'they must contain timm and timm-spinal'),
    ('tags:\n', 'base_model: a b\ntags:\n', "card: base_model 'a b': it is not a repository name"),
    ('tags:\n', 'datasets: [a/b/c]\ntags:\n', "card: datasets 'a/b/c': it is not a repository name"),
    ('value: 0.', 'value: 7.', 'an accuracy lies between 0 and 1'),
    ('value: 0.', 'value: .nan # 0.', 'an accuracy lies between 0 and 1'),
    ('    - type: accuracy\n', '    - kind: accuracy\n', 'model-index cannot be read'),
    ('metrics:\n- accuracy\n', '', 'no list of metrics'),
    ('license: mit', 'license: [', 'are not valid YAML'),
    ('## Limits', '## Nothing', "has no section '## Limits'"),
    ('```python\nimport timm_spinal', '```python\nimport timm', 'does not begin with "import timm_spinal"'),
    ('```bibtex', '```', 'has no citation'),
])
def test_what_the_hub_or_a_user_would_stumble_over(card, old, new, text):
    assert old in card
    with pytest.raises(UserError, match=re.escape(text)):
        check_card(card.replace(old, new, 1))


def test_rows_of_other_seeds_and_controls(run, tmp_path):
    """Mean and sample deviation, by hand, of the published run, a second seed and a control."""
    for name, model, seed, top1 in (('second', 'spinalcnn_a1', 6, 90.), ('control', 'spinalcnn_plain', 5, 80.)):
        folder = shutil.copytree(run, tmp_path / name)
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump(dict(args, model=model, seed=seed, output='/x')))
        result = (folder / 'result.json').read_text()
        (folder / 'result.json').write_text(re.sub(r'"top1": [\d.]+', f'"top1": {top1}', result))
    source = open_run(run)
    metric, rows, recipe = result_rows(source, (str(tmp_path / 'second'), str(tmp_path / 'contr*')))
    first = source.result['top1']
    assert (metric, recipe) == ('validation top-1', [])
    assert [row.label for row in rows] == ['spinalcnn_a1', 'spinalcnn_plain']
    assert rows[0].values == {5: first, 6: 90.} and rows[0].mean == pytest.approx((first + 90) / 2)
    assert rows[0].spread == pytest.approx(abs(first - 90) / 2 ** 0.5) and rows[1].spread is None
    beside = (str(tmp_path / 'second'), str(tmp_path / 'control'))
    text = card_of(source, PublishOptions('me/x', licence='mit', beside=beside))
    assert f'| **spinalcnn_a1** | 13,818 | 5, 6 | {rows[0].text} |' in text
    assert '| spinalcnn_plain | 13,818 | 5 | 80.00 |' in text and 'There is only one seed' not in text
    result = (tmp_path / 'control' / 'result.json').read_text()
    (tmp_path / 'control' / 'result.json').write_text(result.replace('"train_size": 1438', '"train_size": 7'))
    with pytest.raises(UserError, match='--beside: the run of spinalcnn_plain, seed 5, is of other data'):
        result_rows(source, (str(tmp_path / 'control'),))
    with pytest.raises(UserError, match='no folder matches it'):
        result_rows(source, (str(tmp_path / 'none*'),))
    with pytest.raises(UserError, match='is not a finished run'):
        result_rows(source, (str(tmp_path),))


def test_table():
    rows = [ModelResults('a', 1234, True, {0: 50., 1: 52.}), ModelResults('b', 5, False, {0: 49.})]
    assert table(rows, 'test top-1', 'mnist').splitlines()[2:] == [
        '| **a** | 1,234 | 0, 1 | 51.00 +- 1.41 |', '| b | 5 | 0 | 49.00 |']


@pytest.mark.parametrize('args, repo', [
    (dict(model='resnet50_pspinal', pretrained=True), 'timm/resnet50.a1_in1k'),
    (dict(model='resnet50_pspinal.backbone_a2_in1k', pretrained=True), 'timm/resnet50.a2_in1k'),
    (dict(model='hf-hub:me/first@v1', pretrained=True), 'me/first'),
    (dict(model='resnet50_pspinal'), ''),
    (dict(model='resnet18', pretrained=True, pretrained_path='x.pth'), ''),
    (dict(model='local-dir:/x/y', pretrained=True), ''),
])
def test_base_model(args, repo):
    assert base_model(TrainConfig(**args)) == repo


@pytest.mark.parametrize('dataset, name', [
    ('torch/fashion_mnist', 'zalando-datasets/fashion_mnist'), ('hfds/me/pets', 'me/pets'), ('digits', ''), ('', '')])
def test_hub_dataset(dataset, name):
    assert hub_dataset(TrainConfig(dataset=dataset)) == name


def test_licence_of_the_weights_that_training_started_from(run):
    source, none = open_run(run), replace(OPTIONS, licence='')
    with pytest.raises(UserError, match='no licence'):
        resolve_licence(source, none)
    source.config['pretrained_cfg']['license'] = 'cc-by-nc-4.0'
    with pytest.raises(UserError, match='no licence'):
        resolve_licence(source, none)  # the model's name has such weights, the run did not start from them
    source.args.pretrained = True
    assert resolve_licence(source, none) == ('cc-by-nc-4.0', '', '')
    assert resolve_licence(source, OPTIONS) == ('mit', '', '')


@pytest.mark.parametrize('name, papers', [
    ('resnet50_pspinal', [PROGRESSIVE]), ('vgg5_spinal', [SPINAL]), ('spinalcnn_a1', [SPINAL]),
    ('resnet18_xnodr', [XNODR]), ('resnet18_caps', [CAPSULES]), ('capsnet_mnist', [XNODR, CAPSULES]),
    ('icresnet50', [IC]), ('icresnet32_cifar', [IC]), ('resnet34_sb_s48u1d', [SHARED_BASIS]),
    ('mobilenetv2_100_sbpp', [SHARED_BASIS]), ('resnet50_mlp', []), ('icresnet18_spinal', [SPINAL, IC]),
])
def test_papers_by_name(name, papers):
    assert papers_of(name) == papers


def test_papers_by_config():
    assert papers_of('anything', 'arXiv:2006.05066') == [SHARED_BASIS]
    assert papers_of('spinalcnn_plain_xnodr', 'arXiv:2007.03347') == [SPINAL, XNODR]  # net and head are of two papers
    assert papers_of('vgg5_spinal', ('arXiv:1409.1556',)) == [SPINAL]


def test_cost_by_hand():
    """A convolution and a linear layer."""
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5))
    cost = cost_of(model, (3, 4, 4))
    assert cost == Cost(8 * 27 + 5 * 128 + 5, 16 * 8 * 27 + 5 * 128, 16 * 8 + 5, (3, 4, 4))


def test_cost_of_attention_counts_its_products():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cost = cost_of(timm.create_model('test_vit').eval(), (3, 160, 160))
    assert cost.params == sum(p.numel() for p in timm.create_model('test_vit').parameters()) and cost.macs > 1e7


def test_dataset_name_is_that_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / 'pets' / 'x').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'pets' / 'x')
    for name in ('..', '../', str(tmp_path / 'pets'), '../../pets', 'y/../../'):
        assert dataset_name(TrainConfig(data_dir=name)) == 'pets'
    assert dataset_name(TrainConfig(data_dir='.')) == 'x' and dataset_name(TrainConfig()) == ''
