"""Branches, pull requests and tags: what is printed and what stands in the card loads what was published."""
import re

import pytest
import timm
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_spinal.cli import main

from .conftest import REPO, files, new_cache, send

pytestmark = pytest.mark.usefixtures('quick')


def other_weights(run, added=0.01):
    """Change the weights of a run, so that another revision holds others."""
    weights = load_file(run / 'model.safetensors')
    weights = {k: v + added if v.is_floating_point() else v for k, v in weights.items()}
    save_file(weights, run / 'model.safetensors', metadata={'format': 'pt'})


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def is_that_of(model, run):
    mine = load_file(run / 'model.safetensors')
    return all(torch.equal(value, mine[key]) for key, value in model.state_dict().items())


def load_as_told(line):
    """The code at the end of the last line of `publish`."""
    return eval(line.partition(': ')[2], dict(timm=timm))


def run_card(text, folder, monkeypatch):
    """The Python of a card but for the block of transformers, executed as it stands; returns its names."""
    Image.new('L', (30, 30), 77).save(folder / 'image.png')
    monkeypatch.chdir(folder)
    names = {}
    for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        if 'transformers' not in block:
            exec(block, names)
    return names


@pytest.mark.parametrize('flags, told, revision', [
    (('--branch', 'next'), 'next', 'next'),
    (('--branch', 'feature/one.2'), 'feature/one.2', 'feature/one.2'),
    (('--pull-request',), 'refs/pr/1', 'refs/pr/1'),
    (('--tag', 'v1'), 'v1', ''),
    (('--branch', 'next', '--tag', 'v1'), 'v1', 'next'),
    (('--pull-request', '--tag', 'v1'), 'v1', 'refs/pr/1'),
    (('--branch', 'main'), '', ''),
    ((), '', ''),
])
def test_line_and_card_load_what_was_published(hub, run, tmp_path, monkeypatch, capsys, flags, told, revision):
    assert send(run) == 0
    other_weights(run)
    assert send(run, *flags) == 0
    line = last_line(capsys)
    name, card_name = (f'hf-hub:{REPO}' + (f'@{ref}' if ref else '') for ref in (told, revision))
    assert line.endswith(f": timm.create_model('{name}', pretrained=True)")
    new_cache(monkeypatch, tmp_path / 'user')
    assert is_that_of(load_as_told(line), run)
    text = files(hub, revision or 'main')['README.md'].decode()
    assert text.count(f"timm.create_model('{card_name}', pretrained=True") == 2
    assert f'--model {card_name} --pretrained' in text
    assert is_that_of(run_card(text, tmp_path, monkeypatch)['model'], run)
    assert ('pull request 1; once it is merged' in text) == (revision == 'refs/pr/1')
    assert main(['verify', f'{REPO}@{revision}' if revision else REPO, '--dataset', 'digits', '--workers', '0']) == 2, \
        'other weights have another accuracy'


@pytest.mark.slow
def test_fine_tuning_from_a_pull_request(hub, run, tmp_path, monkeypatch):
    assert send(run) == 0
    other_weights(run)
    assert send(run, '--pull-request') == 0
    new_cache(monkeypatch, tmp_path / 'user')
    assert main(['train', '--model', f'hf-hub:{REPO}@refs/pr/1', '--pretrained', '--dataset', 'digits', '--epochs', '1',
                 '--lr', '1e-30', '--warmup-epochs', '0', '--weight-decay', '0', '-j', '0', '--no-aug',
                 '--output', str(tmp_path), '--experiment', 'tuned']) == 0
    tuned, start = (load_file(folder / 'model.safetensors') for folder in (tmp_path / 'tuned', run))
    assert torch.equal(tuned['stages.0.0.weight'], start['stages.0.0.weight'])


def test_number_of_a_pull_request(hub, run, capsys):
    """Discussions are counted with pull requests, and somebody may open one while ours is made."""
    HfApi().create_repo(REPO)
    repo = hub.store.repos[REPO]
    repo.open_pull('another', 'somebody')
    repo.pulls[0]['status'] = 'closed'
    assert send(run, '--pull-request') == 0 and '@refs/pr/2' in last_line(capsys)
    assert len(repo.commits) == 2
    other_weights(run)
    repo.hidden_numbers = 1  # what the list of discussions does not show
    assert send(run, '--pull-request') == 0 and '@refs/pr/4' in last_line(capsys)
    text = files(hub, 'refs/pr/4')['README.md'].decode()
    assert f'hf-hub:{REPO}@refs/pr/4' in text and 'refs/pr/3' not in text
    commits = len(repo.commits)
    assert send(run, '--pull-request') == 0 and len(repo.commits) == commits, 'again changes nothing'


def test_card_of_a_merged_pull_request_is_replaced_by_the_next_publication(hub, run, capsys):
    HfApi().create_repo(REPO)
    assert send(run, '--pull-request') == 0
    repo = hub.store.repos[REPO]
    repo.branches['main'] = repo.branches['refs/pr/1']
    repo.pulls[0]['status'] = 'merged'
    assert send(run) == 0
    assert f"timm.create_model('hf-hub:{REPO}', pretrained" in files(hub)['README.md'].decode()


# ---- tags -------------------------------------------------------------------------------------------------------


def writes(hub):
    return [(method, path) for method, path in hub.log if method != 'GET' and method != 'HEAD']


@pytest.mark.parametrize('flags', [(), ('--branch', 'next'), ('--branch', 'other'), ('--pull-request',)])
def test_a_taken_tag_is_noticed_before_anything_is_changed(hub, run, capsys, flags):
    assert send(run, '--tag', 'v1') == 0 and send(run, '--branch', 'other') == 0
    repo = hub.store.repos[REPO]
    other_weights(run)
    before = dict(repo.branches), dict(repo.tags), dict(repo.commits), list(repo.pulls)
    hub.log.clear()
    assert send(run, '--tag', 'v1', *flags) == 2
    err = capsys.readouterr().err
    assert err == f'error: {REPO}: the tag v1 is on another commit; choose another name\n'
    assert (repo.branches, repo.tags, repo.commits, repo.pulls) == before and writes(hub) == []


@pytest.mark.parametrize('flags', [(), ('--branch', 'next'), ('--pull-request',)])
def test_a_tag_that_is_there_already(hub, run, flags):
    HfApi().create_repo(REPO)
    for _ in range(2):
        assert send(run, '--tag', 'v1', *flags) == 0
    repo = hub.store.repos[REPO]
    assert len(repo.commits) == 2 and repo.tags == {'v1': list(repo.commits)[-1]}


@pytest.mark.parametrize('flags, text', [
    (('--branch', 'a@b'), "--branch 'a@b': cannot be what follows the @ of a name on the Hub; use letters, digits"),
    (('--branch', 'a b'), "--branch 'a b': cannot be"),
    (('--branch', 'refs/pr/1'), "--branch 'refs/pr/1': cannot be"),
    (('--tag', 'a..b'), "--tag 'a..b': cannot be"),
    (('--tag', 'v1:'), "--tag 'v1:': cannot be"),
    (('--tag', 'main'), '--tag main: is the name of a branch'),
    (('--branch', 'x', '--tag', 'x'), '--tag x: is the name of a branch'),
])
def test_names_that_nothing_could_load(hub, run, capsys, flags, text):
    assert send(run, *flags) == 2
    err = capsys.readouterr().err
    assert text in err and err.count('\n') == 1 and hub.store.repos == {}


def test_a_tag_of_the_name_of_a_branch(hub, run, capsys):
    assert send(run, '--branch', 'next') == 0
    hub.log.clear()
    assert send(run, '--tag', 'next') == 2
    assert 'the tag next is on another commit' in capsys.readouterr().err and writes(hub) == []
