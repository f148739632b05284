"""Faults while publishing: passing ones are overcome, others leave the repository as it was."""
import pytest
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from timm_spinal.hub.package import FILES

from .conftest import REPO, files, send

pytestmark = pytest.mark.usefixtures('quick')

STEPS = [
    ('GET', 'whoami'), ('GET', '/api/models/me/digits$'), ('POST', 'repos/create'), ('POST', 'validate-yaml'),
    ('GET', '/tree/'), ('POST', 'preupload'), ('POST', 'objects/batch'), ('PUT', 'lfs-put'), ('POST', '/commit/'),
    ('POST', '/tag/'), ('HEAD', '/resolve/'), ('GET', '/cdn/'),
]
FAULTS = {
    '503': ('status', dict(status=503)),
    '429': ('status', dict(status=429, headers={'Retry-After': '1'})),
    'cut': ('cut', {}),
    'answer lost': ('cut_after', {}),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_passing_faults_at_every_step(hub, run, fault):
    """One fault at each step of one publication: it ends as without them, in one commit."""
    kind, kwargs = FAULTS[fault]
    faults = [hub.fail(kind, method, path, **kwargs) for method, path in STEPS]
    assert send(run, '--tag', 'v1') == 0
    assert [(f.method, f.path) for f in faults if f.times] == []
    repo = hub.store.repos[REPO]
    assert len(repo.commits) == 2 and set(files(hub)) == set(FILES) and repo.tags == {'v1': repo.branches['main']}


def test_lost_answer_makes_no_second_pull_request(hub, run):
    HfApi().create_repo(REPO)
    hub.fail('cut_after', 'POST', '/commit/')
    assert send(run, '--pull-request') == 0
    assert len(hub.store.repos[REPO].pulls) == 1


@pytest.mark.parametrize('method, path', [('POST', 'preupload'), ('PUT', 'lfs-put'), ('POST', '/commit/')])
def test_failure_leaves_the_repository_as_it_was(hub, run, method, path, capsys):
    hub.fail('status', method, path, status=500, times=1000)
    assert send(run, '--branch', 'next') == 2
    assert hub.store.repos == {}, 'a repository that was made for it goes again'
    assert 'the Hub has a fault' in capsys.readouterr().err.splitlines()[-1]
    hub.faults.clear()
    assert send(run) == 0
    before = dict(hub.store.repos[REPO].branches)
    hub.fail('status', method, path, status=500, times=1000)
    (run / 'curves.png').unlink()
    rewritten = load_file(run / 'model.safetensors')
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in rewritten.items()}, run / 'model.safetensors')
    assert send(run, '--branch', 'next') == 2
    assert hub.store.repos[REPO].branches == before


def test_download_that_differs_is_told(hub, run, capsys):
    hub.fail('corrupt', 'GET', '/cdn/', times=9)
    assert send(run) == 2
    err = capsys.readouterr().err
    commit = hub.store.repos[REPO].branches['main'][:8]
    assert 'came back from the Hub with other content' in err and f'(the files are committed, as {commit})' in err


def test_somebody_else_commits_meanwhile(hub, run, capsys):
    assert send(run) == 0
    (run / 'curves.png').unlink()
    hub.fail('status', 'POST', '/commit/', status=412)
    assert send(run) == 2
    assert 'somebody else has changed it in the meantime' in capsys.readouterr().err


def test_upload_by_xet_without_its_service(hub, run, monkeypatch, capsys):
    """The client has no other way for large files when hf_xet is on; the repository stays as it was."""
    pytest.importorskip('hf_xet')
    assert send(run) == 0
    before = dict(hub.store.repos[REPO].branches)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    weights = {k: v + 1 if v.is_floating_point() else v for k, v in load_file(run / 'model.safetensors').items()}
    save_file(weights, run / 'model.safetensors')
    assert send(run) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith('error: me/digits: ')
    assert hub.store.repos[REPO].branches == before and hub.count('GET', 'xet-write-token') > 0
