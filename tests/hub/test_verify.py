"""`timm-spinal verify`: what was published is what is there, and does what the card says."""
import re

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load, save

from timm_spinal.cli import main
from timm_spinal.hub.package import FILES

from ..conftest import THE_HUB
from .conftest import REPO
from .store import Blob


@pytest.fixture
def published(hub, run, capsys):
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--tag', 'v1']) == 0
    capsys.readouterr()
    return hub.store.repos[REPO]


def change(repo, name, function):
    """Another content of a published file, as somebody with write permission could commit it."""
    files = dict(repo.files())
    blob = files[name]
    files[name] = Blob(function(blob.data), blob.large)
    repo.add_commit('main', files, 'changed')
    THE_HUB.store.add_large(files[name].data)


@pytest.mark.usefixtures('both_ways')
def test_whole(published, capsys):
    assert main(['verify', REPO]) == 0
    assert 'golden tensors differ by 0.0e+00' in capsys.readouterr().out


def test_accuracy_of_the_card(published, capsys):
    assert main(['verify', f'{REPO}@v1', '--dataset', 'digits', '--workers', '0']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    stated = float(re.search(r'value: ([\d.]+)', published.files()['README.md'].data.decode())[1])
    assert line == f'{REPO}@v1: top-1 on validation is {100 * stated:.2f} %, as the card says ({100 * stated:.2f} %)'


def test_a_card_that_says_too_much(published, capsys):
    stated = re.search(rb'value: ([\d.]+)', published.files()['README.md'].data)[1]
    change(published, 'README.md', lambda text: text.replace(b'value: ' + stated, b'value: 0.999', 1))
    assert main(['verify', REPO, '--dataset', 'digits', '--workers', '0']) == 2
    err = capsys.readouterr().err
    assert 'the card says 99.90 %' in err and err.count('\n') == 1
    assert main(['verify', f'{REPO}@v1', '--dataset', 'digits', '--workers', '0']) == 0


def test_folder_of_a_dry_run(run, capsys, tmp_path):
    folder = str(tmp_path / 'package')
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--dry-run', '--output', folder]) == 0
    assert main(['verify', folder, '--dataset', 'digits', '--workers', '0']) == 0
    (tmp_path / 'package' / 'README.md').write_text('mine')
    assert main(['verify', folder]) == 2 and 'card: it has no metadata' in capsys.readouterr().err


def other_weights(data):
    weights = load(data)
    weights['head.fc.weight'] += 0.01
    return save(weights)


@pytest.mark.parametrize('name, function, text', [
    ('model.safetensors', other_weights, r'logits differs from test/golden.safetensors by \d'),
    ('model.safetensors', lambda data: data[:100], 'do not load into what config.json names'),
    ('config.json', lambda text: text.replace(b'"spinalcnn_a1"', b'"spinalcnn_plain"'), 'do not load into what'),
    ('config.json', lambda text: text.replace(b'"spinalcnn_a1"', b'"nonsense"'), "unknown model 'nonsense'"),
    ('test/golden.safetensors', lambda data: save({'a': load(data)['input']}), 'contains no input and logits'),
    ('train_hparams.yaml', lambda text: text.replace(b'val_split: validation', b'val_split: train'),
     'its card names no accuracy of train'),
])
def test_what_does_not_fit(published, capsys, name, function, text):
    change(published, name, function)
    assert main(['verify', REPO, '--dataset', 'digits', '--workers', '0']) == 2
    err = capsys.readouterr().err
    assert re.search(text, err) and err.startswith('error: ') and err.count('\n') == 1


def test_damaged_on_the_way(published, hub, capsys):
    hub.fail('corrupt', 'GET', '/(cdn|xorbs)/', times=9)
    assert main(['verify', REPO]) == 2
    assert 'was damaged in the download (its checksum is not that of the Hub); try again' in capsys.readouterr().err


def test_recipes_of_others_run_no_code_and_download_nothing(published, run):
    from timm_spinal.hub.measure import evaluation
    from timm_spinal.hub.verify import _parser
    from timm_spinal.training.config import TrainConfig
    recipe = TrainConfig(dataset='hfds/a/b', data_dir='/etc', dataset_download=True, dataset_trust_remote_code=True)
    config, split = evaluation(recipe, run, _parser().parse_args(['x', '--data-dir', 'here']))
    assert (config.data_dir, config.dataset_download, config.dataset_trust_remote_code) == ('here', False, False)
    assert config.dataset == 'hfds/a/b' and split == 'validation'
    recipe = TrainConfig(dataset='torch/mnist', val_split_fraction=0.1, test_split='test', seed=9)
    config, split = evaluation(recipe, run, _parser().parse_args(['x', '--data-dir', 'here']))
    assert (config.val_split, config.val_split_fraction, split) == ('test', 0., 'test')


def test_repository_without_a_publication(hub, capsys):
    HfApi().create_repo('me/empty')
    assert main(['verify', 'me/empty']) == 2
    assert 'has no README.md, so timm-spinal publish did not write it' in capsys.readouterr().err
    assert main(['verify', 'a b']) == 2 and 'is not a repository name' in capsys.readouterr().err


def test_every_file_is_fetched_of_one_commit(published, hub):
    hub.log.clear()
    assert main(['verify', REPO]) == 0
    asked = {path for method, path in hub.log if method == 'HEAD'}
    assert asked == {f'/{REPO}/resolve/{published.branches["main"]}/{name}' for name in FILES}
