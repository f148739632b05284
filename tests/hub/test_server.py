"""The test Hub itself: the real client can do with it what it can do with the Hub, and meets the faults it asks for."""
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import push_to_hf_hub

from .conftest import new_cache
from .server import PART

WEIGHTS = bytes(range(256)) * 1024  # four parts


def push(hub, repo='me/thing', files=None, **kwargs):
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    files = files or {'a.txt': b'text', 'model.safetensors': WEIGHTS}
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(repo, operations, commit_message='add', **kwargs)


@pytest.mark.usefixtures('both_ways')
def test_timm_pushes_and_loads_to_the_bit(hub, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', num_classes=3).eval()
    push_to_hf_hub(model, 'me/tiny', safe_serialization=True, model_card=dict(license='mit'))
    again = timm.create_model('hf-hub:me/tiny', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and hub.cdn_tokens == []
    new_cache(monkeypatch, tmp_path / 'other')
    adapted = timm.create_model('hf-hub:me/tiny', pretrained=True, num_classes=5, in_chans=1)
    assert adapted(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_files_small_and_large_come_back(hub, no_xet):
    assert len(WEIGHTS) > 3 * PART
    info = push(hub, files={'a.txt': b'text', 'sub/small.safetensors': b'\0' * 10, 'model.safetensors': WEIGHTS})
    assert hub.count('PUT', 'lfs-put/.*/4$') == 1 and hub.count('POST', 'lfs-complete') == 1
    assert hub.count('PUT', r'lfs-put/\w+$') == 1
    assert hub.store.repos['me/thing'].branches['main'] == info.oid
    for path, data in (('a.txt', b'text'), ('model.safetensors', WEIGHTS), ('sub/small.safetensors', b'\0' * 10)):
        with open(hf_hub_download('me/thing', path), 'rb') as f:
            assert f.read() == data


def test_same_files_make_no_commit(hub):
    first = push(hub)
    assert push(hub).oid == first.oid
    assert len(hub.store.repos['me/thing'].commits) == 2


def test_branches_tags_and_pull_requests(hub):
    api = HfApi()
    first = push(hub)
    api.create_branch('me/thing', branch='next')
    second = push(hub, files={'a.txt': b'other'}, revision='next')
    api.create_tag('me/thing', tag='v1', revision='next')
    pull = push(hub, files={'a.txt': b'third'}, create_pr=True)
    assert pull.pr_revision == 'refs/pr/1'
    content = {r: Path(hf_hub_download('me/thing', 'a.txt', revision=r)).read_text()
               for r in ('main', 'next', 'v1', 'refs/pr/1', first.oid, second.oid)}
    assert content == {'main': 'text', 'next': 'other', 'v1': 'other', 'refs/pr/1': 'third', first.oid: 'text',
                       second.oid: 'other'}
    assert [d.title for d in api.get_repo_discussions('me/thing')] == ['add']
    assert {t.name for t in api.list_repo_refs('me/thing').tags} == {'v1'}
    assert {f.path for f in api.list_repo_tree('me/thing')} == {'.gitattributes', 'a.txt', 'model.safetensors'}


def test_errors_by_code(hub, monkeypatch):
    push(hub)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download('me/thing', 'none.txt')
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download('me/thing', 'a.txt', revision='none')
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('me/none', 'a.txt')
    hub.store.repos['me/thing'].gated = True
    monkeypatch.setenv('HF_TOKEN', 'hf_stranger')
    with pytest.raises(GatedRepoError):
        hf_hub_download('me/thing', 'a.txt')
    hub.store.repos['me/thing'].private = True
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('me/thing', 'a.txt')
    for token in ('hf_stranger', 'hf_reader'):
        monkeypatch.setenv('HF_TOKEN', token)
        with pytest.raises(HfHubHTTPError, match='403 Forbidden'):
            HfApi().create_repo('me/new')
    monkeypatch.setenv('HF_TOKEN', 'hf_nobody')
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        HfApi().whoami()


def test_commit_on_a_changed_parent_is_refused(hub):
    first = push(hub)
    push(hub, files={'a.txt': b'second'})
    with pytest.raises(HfHubHTTPError, match='412'):
        push(hub, files={'a.txt': b'third'}, parent_commit=first.oid)


@pytest.mark.parametrize('kind, kwargs', [
    ('status', dict(status=503)),
    ('status', dict(status=429, headers={'Retry-After': '0'})),
    ('cut', {}),
    ('cut_after', {}),
])
def test_client_goes_on_after_a_fault_of_large_files(hub, no_xet, kind, kwargs):
    fault = hub.fail(kind, 'PUT', 'lfs-put', **kwargs)
    push(hub)
    assert fault.times == 0 and hub.store.repos['me/thing'].files()['model.safetensors'].data == WEIGHTS


@pytest.mark.parametrize('kind', ['cut_body', 'cut'])
def test_cut_downloads_go_on_where_they_were(hub, no_xet, kind):
    push(hub)
    hub.fail(kind, 'GET', '/cdn/')
    with open(hf_hub_download('me/thing', 'model.safetensors'), 'rb') as f:
        assert f.read() == WEIGHTS
    assert hub.count('GET', '/cdn/') == 2


def test_slow_body_is_given_up_and_asked_for_again(hub, no_xet, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.3)
    push(hub)
    hub.fail('slow', 'GET', '/cdn/', seconds=1.)
    with open(hf_hub_download('me/thing', 'model.safetensors'), 'rb') as f:
        assert f.read() == WEIGHTS
    assert hub.count('GET', '/cdn/') == 2


@pytest.mark.usefixtures('both_ways')
def test_corrupt_body_has_the_right_length(hub):
    push(hub)
    hub.fail('corrupt', 'GET', '/(cdn|xorbs)/')
    with open(hf_hub_download('me/thing', 'model.safetensors'), 'rb') as f:
        data = f.read()
    assert len(data) == len(WEIGHTS) and data != WEIGHTS


def test_metadata_that_is_no_yaml_is_refused(hub):
    with pytest.raises(ValueError, match='Invalid metadata in README.md'):
        push(hub, files={'README.md': b'---\na: [\n---\n'})
