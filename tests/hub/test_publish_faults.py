"""Faults while publishing: passing ones are overcome, others leave the repository as it was."""
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from timm_spinal.errors import UserError
from timm_spinal.hub import retry
from timm_spinal.hub.package import FILES

from .conftest import REPO, files, send
from .store import Repo

pytestmark = pytest.mark.usefixtures('quick')

ASKED = [('GET', 'whoami'), ('GET', '/api/models/me/digits$'), ('POST', 'repos/create'), ('POST', 'validate-yaml'),
         ('GET', '/tree/'), ('POST', 'preupload')]
ANSWERED = [('POST', '/commit/'), ('POST', '/tag/'), ('HEAD', '/resolve/')]
STEPS = {
    'xet': [*ASKED, ('GET', 'xet-write-token'), ('POST', '/cas/v1/xorbs'), ('POST', '/cas/v2/shards'), *ANSWERED,
            ('GET', 'xet-read-token'), ('GET', '/cas/v2/reconstructions'), ('GET', '/xorbs/')],
    'no_xet': [*ASKED, ('POST', 'objects/batch'), ('PUT', 'lfs-put'), *ANSWERED, ('GET', '/cdn/')],
}
FAULTS = {
    '503': ('status', dict(status=503)),
    '429': ('status', dict(status=429, headers={'Retry-After': '1'})),
    'cut': ('cut', {}),
    'answer lost': ('cut_after', {}),
}


@pytest.mark.parametrize('way', STEPS)
@pytest.mark.parametrize('fault', FAULTS)
def test_passing_faults_at_every_step(hub, run, fault, way, request):
    """One fault at each step of one publication: it ends as without them, in one commit."""
    if way == 'no_xet':
        request.getfixturevalue('no_xet')
    kind, kwargs = FAULTS[fault]
    faults = [hub.fail(kind, method, path, **kwargs) for method, path in STEPS[way]]
    assert send(run, '--tag', 'v1') == 0
    assert [(f.method, f.path) for f in faults if f.times] == []
    repo = hub.store.repos[REPO]
    assert len(repo.commits) == 2 and set(files(hub)) == set(FILES) and repo.tags == {'v1': repo.branches['main']}


@pytest.mark.parametrize('asked, pauses', [('7', [7.]), ('soon', [0.5]), (None, [0.5])])
def test_the_hub_is_left_alone_as_long_as_it_asks(hub, monkeypatch, asked, pauses):
    waited, said = [], []
    monkeypatch.setattr(retry, 'time', SimpleNamespace(sleep=waited.append))
    HfApi().create_repo(REPO)
    headers = {} if asked is None else {'Retry-After': asked}
    hub.fail('status', 'GET', f'/api/models/{REPO}', status=429, headers=headers)
    assert retry.with_retries(lambda: HfApi().model_info(REPO), 'info', said.append, waits=(0.5,)).id == REPO
    assert waited == pauses and said == [f'info: status 429; trying again in {pauses[0]:g} s']


def test_a_pause_of_an_hour_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(retry, 'time', SimpleNamespace(sleep=lambda seconds: pytest.fail('waited')))
    HfApi().create_repo(REPO)
    hub.fail('status', 'GET', f'/api/models/{REPO}', status=429, headers={'Retry-After': '3600'})
    with pytest.raises(UserError, match='info: .*429'):
        retry.with_retries(lambda: HfApi().model_info(REPO), 'info', print)


def test_lost_answer_makes_no_second_pull_request(hub, run):
    HfApi().create_repo(REPO)
    hub.fail('cut_after', 'POST', '/commit/')
    assert send(run, '--pull-request') == 0
    assert len(hub.store.repos[REPO].pulls) == 1


@pytest.mark.slow
@pytest.mark.parametrize('method, path', [
    ('POST', 'preupload'), ('PUT', 'lfs-put'), ('POST', '/cas/v1/xorbs'), ('POST', '/commit/')])
def test_failure_leaves_the_repository_as_it_was(hub, run, method, path, capsys, request):
    if 'lfs' in path:
        request.getfixturevalue('no_xet')
    hub.fail('status', method, path, status=500, times=1000)
    assert send(run, '--branch', 'next') == 2
    assert hub.store.repos == {}, 'a repository that was made for it goes again'
    where = 'the storage of large files' if 'cas' in path else 'the Hub'
    assert f'{where} has a fault (status 500' in capsys.readouterr().err.splitlines()[-1]
    hub.faults.clear()
    assert send(run) == 0
    before = dict(hub.store.repos[REPO].branches)
    hub.fail('status', method, path, status=500, times=1000)
    (run / 'curves.png').unlink()
    rewritten = load_file(run / 'model.safetensors')
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in rewritten.items()}, run / 'model.safetensors')
    assert send(run, '--branch', 'next') == 2
    assert hub.store.repos[REPO].branches == before


@pytest.mark.usefixtures('both_ways')
def test_download_that_differs_is_told(hub, run, capsys):
    hub.fail('corrupt', 'GET', '/(cdn|xorbs)/', times=9)
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


# ---- what is told ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path, status, text', [
    ('xet-write-token', 401, 'the token is not valid (status 401); log in'),
    ('xet-write-token', 403, 'the token may not do this (status 403); make one with write permission'),
    ('xet-write-token', 404, 'there is no such repository on the Hub, or it is private'),
    ('xet-write-token', 429, 'the Hub has had too many requests from you (status 429)'),
    ('xet-write-token', 503, 'the Hub has a fault (status 503)'),
    ('/cas/v1/xorbs', 401, 'the storage of large files refuses it (status 401)'),
    ('/cas/v1/xorbs', 403, 'the storage of large files refuses it (status 403)'),
    ('/cas/v1/xorbs', 404, 'the storage of large files does not have it (status 404)'),
    ('/cas/v1/xorbs', 429, 'the storage of large files has had too many requests from you (status 429)'),
    ('/cas/v1/xorbs', 503, 'the storage of large files has a fault (status 503)'),
    ('/cas/v[12]/shards', 400, 'the storage of large files refuses it (status 400)'),
])
def test_status_of_xet_is_told_as_such(hub, run, path, status, text, capsys):
    hub.fail('status', 'GET' if 'token' in path else 'POST', path, status=status, times=1000)
    assert one_line(run, capsys).startswith(f'error: {REPO}: {text}')
    assert hub.store.repos == {}


def one_line(run, capsys, *flags) -> str:
    """What a publication that fails says at its end."""
    assert send(run, *flags) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'hf_writer' not in err
    return err


PAGE = b'<html><head><title>Log in to the network</title></head><body>Please log in</body></html>'


@pytest.mark.parametrize('method, path', [
    ('GET', 'whoami'), ('GET', '/api/models/me/digits$'), ('POST', 'preupload'), ('POST', '/commit/')])
def test_page_in_place_of_an_answer(hub, run, method, path, capsys):
    hub.fail('status', method, path, status=200, times=1000, body=PAGE, headers={'Content-Type': 'text/html'})
    assert one_line(run, capsys) == (
        f"error: {REPO}: the page 'Log in to the network' came instead of an answer of the Hub; a proxy or a login "
        'page may be in between\n')


@pytest.mark.parametrize('path', ['xet-write-token', '/cas/v1/xorbs', '/cas/v2/shards'])
def test_page_in_place_of_an_answer_of_xet(hub, run, path, capsys):
    hub.fail('status', 'GET' if 'token' in path else 'POST', path, status=200, times=1000, body=PAGE)
    assert "what came from Xet's storage cannot be read" in one_line(run, capsys)


def test_cut_connections_to_the_storage(hub, run, capsys):
    hub.fail('cut', 'POST', '/cas/', times=1000)
    assert one_line(run, capsys).startswith(f'error: {REPO}: the Hub cannot be reached (')


@pytest.mark.parametrize('method, path, body, text', [
    ('GET', 'whoami', b'[]', 'TypeError: '), ('GET', 'whoami', b'{}', "KeyError: 'name'"),
    ('GET', 'whoami', b'{"name": "me", "auth": null}', 'AttributeError: '),
    ('GET', '/api/models/me/digits$', b'[1]', 'TypeError: '), ('POST', '/commit/', b'{}', "KeyError: 'commitUrl'")])
def test_json_of_another_form(hub, run, method, path, body, text, capsys):
    hub.fail('status', method, path, status=200, times=1000, body=body)
    assert f'{REPO}: the Hub gave an answer that its client cannot read ({text}' in one_line(run, capsys)


@pytest.mark.parametrize('body', [b'{"error": "on demand"}', b'', b'[]', PAGE])
def test_conflict_without_an_address(hub, run, body, capsys):
    """A repository that is there already is no error; another conflict is, and is told."""
    fault = hub.fail('status', 'POST', 'repos/create', status=409, times=1000, body=body)
    assert 'the Hub refuses it (status 409' in one_line(run, capsys)
    hub.store.repos[REPO] = Repo(REPO)
    hub.fail('status', 'GET', '/api/models/me/digits$', status=404, headers={'X-Error-Code': 'RepoNotFound'})
    assert send(run) == 0 and fault.times < 1000


def test_link_that_has_expired(hub, run, capsys, no_xet):
    """A link to a large file holds for a while only; the next try gets a new one, and no token is to blame."""
    expired = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>'
    headers = {'Content-Type': 'application/xml'}
    fault = hub.fail('status', 'GET', '/cdn/', status=403, body=expired, headers=headers)
    assert send(run) == 0 and fault.times == 0
    assert 'status 403; trying again' in capsys.readouterr().out
    hub.fail('status', 'GET', '/cdn/', status=403, times=1000, body=expired, headers=headers)
    assert one_line(run, capsys).startswith(
        f'error: {REPO}: the storage of large files refuses it (status 403: AccessDenied Request has expired); what '
        'allowed it may have expired: try again (the files are committed')
