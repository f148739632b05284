"""What a user reads when a model of the Hub cannot be had, and what works as timm's own: adaptation and the cache."""
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants, hf_hub_download

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.model import create_model

from . import storage
from .conftest import REPO, new_cache
from .store import Blob

NAME = f'hf-hub:{REPO}'


@pytest.fixture
def published(hub, run, monkeypatch, tmp_path, capsys):
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit']) == 0
    new_cache(monkeypatch, tmp_path / 'user')
    capsys.readouterr()
    return hub.store.repos[REPO]


def load(name=NAME, **kwargs):
    return create_model(ValidateConfig(model=name, pretrained=True, **kwargs), None)


def message(name=NAME) -> str:
    with pytest.raises(UserError) as error:
        load(name)
    text = str(error.value)
    assert '\n' not in text and text.startswith(f'model {name}: ') and 'hf_writer' not in text
    return text.partition(f'{name}: ')[2]


@pytest.mark.usefixtures('both_ways')
def test_adapts_as_timm_does(published):
    x = torch.randn(2, 1, 28, 28)
    model = timm.create_model(NAME, pretrained=True).eval()
    other = timm.create_model(NAME, pretrained=True, num_classes=3).eval()
    assert other(x).shape == (2, 3)
    assert torch.equal(other.forward_head(other.forward_features(x), pre_logits=True),
                       model.forward_head(model.forward_features(x), pre_logits=True))
    colour = timm.create_model(NAME, pretrained=True, in_chans=3).eval()
    assert torch.equal(colour.stages[0][0].bias, model.stages[0][0].bias)
    assert colour(x.expand(-1, 3, -1, -1)).shape == (2, 10)
    maps = timm.create_model(NAME, pretrained=True, features_only=True).eval()(x)
    assert torch.equal(maps[-1], model.forward_features(x))


def test_cache_is_enough_without_a_network(published, monkeypatch):
    model = load()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    again = load()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert message('hf-hub:me/other') == (
        'HF_HUB_OFFLINE is set and the cache does not have it; unset it, or fetch it once while online')


def test_missing_and_private_repositories(published, monkeypatch):
    assert message('hf-hub:me/none') == ('there is no such repository on the Hub, or it is private and your token may '
                                         'not read it; check the name')
    published.private = True
    monkeypatch.setenv('HF_TOKEN', 'hf_stranger')
    assert 'or it is private and your token may not read it' in message()
    monkeypatch.setenv('HF_TOKEN', '')
    assert message() == ("there is no such repository on the Hub, or it is private: log in with 'hf auth login', or "
                         'set HF_TOKEN')
    monkeypatch.setenv('HF_TOKEN', 'hf_nobody')
    assert message().startswith('the token is not valid (Invalid credentials')
    published.private, published.gated = False, True
    monkeypatch.setenv('HF_TOKEN', 'hf_stranger')
    assert message().startswith('access to it is restricted')


def test_revisions_and_repositories_without_a_model(published):
    assert message(f'{NAME}@none') == 'it has no such branch, tag or commit; check what follows the @'
    files = dict(published.files())
    del files['config.json']
    published.add_commit('main', files, 'no config')
    assert message() == 'has no config.json, so timm cannot load it as a model'
    assert message('hf-hub:a b').startswith('is not a valid repository name')


def test_no_network(published, quick, monkeypatch):
    """Nobody listens at the Hub's address."""
    load()
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, 'http://127.0.0.1:1')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', address)
    assert message('hf-hub:me/other').startswith('the Hub cannot be reached (')
    load()  # from the cache


def test_connections_that_are_cut(published, hub, quick):
    hub.fail('cut', 'HEAD', '/resolve/', times=1000)
    assert message().startswith('the Hub cannot be reached (')


def test_hub_that_is_down(published, hub, quick):
    hub.fail('status', 'HEAD', '/resolve/', times=1000)
    assert message() == 'the Hub has a fault (status 503); try again later'
    hub.faults.clear()
    hub.fail('status', 'HEAD', '/resolve/', times=1000, status=429)
    assert message().startswith('the Hub has had too many requests from you')


@pytest.mark.usefixtures('both_ways')
@pytest.mark.parametrize('kind', ['cut', 'cut_body'])
def test_download_cut_for_good_is_no_half_file(published, hub, quick, tmp_path, kind):
    hub.fail(kind, 'GET', '/(cdn|xorbs)/', times=1000)
    assert message().startswith(('the Hub cannot be reached (', "what came from Xet's storage cannot be read ("))
    hub.faults.clear()
    assert all(p.stat().st_size < 10_000 for p in (tmp_path / 'user').rglob('*') if p.is_file())
    load()


@pytest.mark.parametrize('path, status, text', [
    ('xet-read-token', 401, 'the token is not valid (on demand); log in'),
    ('xet-read-token', 403, 'the token may not do this (on demand); make one with read permission'),
    ('xet-read-token', 404, 'the Hub does not have it (status 404: on demand)'),
    ('xet-read-token', 429, 'the Hub has had too many requests from you (status 429: on demand)'),
    ('xet-read-token', 503, 'the Hub has a fault (status 503: on demand)'),
    ('/cas/', 401, 'the storage of large files refuses it (status 401); what allowed it may have expired: try again'),
    ('/cas/', 403, 'the storage of large files refuses it (status 403)'),
    ('/cas/', 404, 'the storage of large files does not have it (status 404)'),
    ('/cas/', 429, 'the storage of large files has had too many requests from you (status 429)'),
    ('/cas/', 503, 'the storage of large files has a fault (status 503)'),
    ('/xorbs/', 401, 'the storage of large files refuses it (status 401)'),
    ('/xorbs/', 403, 'the storage of large files refuses it (status 403)'),
    ('/xorbs/', 404, 'the storage of large files does not have it (status 404)'),
    ('/xorbs/', 429, 'the storage of large files has had too many requests from you (status 429)'),
    ('/xorbs/', 503, 'the storage of large files has a fault (status 503)'),
])
def test_status_of_xet_is_told_as_such(published, hub, quick, path, status, text):
    hub.fail('status', 'GET', path, status=status, times=1000)
    assert message().startswith(text)
    hub.faults.clear()
    load()


@pytest.mark.parametrize('status, text', [
    (401, 'the token is not valid (status 401); log in'),
    (403, 'the token may not do this (status 403); make one with read permission'),
    (503, 'the Hub has a fault (status 503)'),
])
def test_token_of_the_storage_that_has_expired(published, hub, quick, monkeypatch, status, text):
    """hf_xet asks for another one by itself, and says what it gets."""
    monkeypatch.setattr(storage, 'LIFETIME', -100)
    load()
    new_cache(monkeypatch, Path(constants.HF_HUB_CACHE).with_name('again'))
    asked = hub.count('GET', 'xet-read-token')
    hub.fail('slow', 'GET', 'xet-read-token')  # no fault: the first one, for huggingface_hub, is answered
    hub.fail('status', 'GET', 'xet-read-token', times=1000, status=status)
    assert message().startswith(text) and hub.count('GET', 'xet-read-token') > asked + 1


@pytest.mark.parametrize('path, text', [
    ('xet-read-token', 'HF_ENDPOINT does not answer as a Hub does (Xet headers'),
    ('/cas/v[12]/reconstructions', "what came from Xet's storage cannot be read ("),
    ('/xorbs/', "what came from Xet's storage cannot be read ("),
])
def test_page_in_place_of_an_answer_of_xet(published, hub, quick, path, text):
    hub.fail('status', 'GET', path, status=200, times=1000, body=b'<html>Log in to the network</html>')
    assert message().startswith(text)


def test_page_in_place_of_the_hub(published, hub, quick):
    page = dict(status=200, times=1000, body=b'<html>Log in to the network</html>')
    hub.fail('status', 'HEAD', '/resolve/', **page)
    assert message().startswith('HF_ENDPOINT does not answer as a Hub does (')
    hub.faults.clear()
    hub.fail('status', 'GET', '/resolve/.*config.json', **page)
    assert message().startswith('came incomplete; try again')


def test_link_that_has_expired(published, hub, no_xet):
    hub.fail('status', 'GET', '/cdn/', status=403, times=1000, body=b'<Error><Code>AccessDenied</Code></Error>')
    assert message() == ('the storage of large files refuses it (status 403: AccessDenied); what allowed it may have '
                         'expired: try again')


def test_config_that_is_no_json(published, hub):
    files = dict(published.files(), **{'config.json': Blob(b'<html>')})
    published.add_commit('main', files, 'no JSON')
    assert message().startswith('its config.json is not valid JSON (')


@pytest.mark.usefixtures('both_ways')
def test_train_from_the_hub(published, tmp_path):
    assert main([
        'train', '--model', NAME, '--pretrained', '--dataset', 'digits', '-j', '0', '--epochs', '1', '--lr', '0',
        '--warmup-lr', '0', '--min-lr', '0', '--output', str(tmp_path / 'out'), '--experiment', 'tuned']) == 0
    result = json.loads((tmp_path / 'out' / 'tuned' / 'result.json').read_text())
    assert result['top1'] > 85, 'the published weights, which no step has changed'


def test_truncated_weights_in_the_cache(published):
    path = Path(hf_hub_download(REPO, 'model.safetensors')).resolve()
    path.chmod(0o644)  # the client's shared store is for reading only
    path.write_bytes(path.read_bytes()[:50])
    assert message().startswith('its weights are damaged (')


@pytest.mark.usefixtures('both_ways')
def test_full_disk(published, full_disk, tmp_path):
    with full_disk(20_000):
        assert message() == ('cannot be written (File too large); make room, or set HF_HOME to another disk')
    left = [p for p in (tmp_path / 'user').rglob('*') if p.is_file() and p.suffix == '.incomplete']
    assert left == []
    load()


def test_trainer_and_validation_tell_the_same(published, capsys, tmp_path):
    for command in (['train', '--dataset', 'digits', '--output', str(tmp_path / 'out')],
                    ['validate', '--dataset', 'digits']):
        assert main([*command, '--model', 'hf-hub:me/none', '--pretrained']) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: model hf-hub:me/none: there is no such repository') and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.usefixtures('both_ways')
def test_validate_a_published_model(published, run, capsys):
    assert main(['validate', '--model', NAME, '--pretrained', '--dataset', 'digits', '-j', '0']) == 0
    top1 = json.loads((run / 'result.json').read_text())['top1']
    assert f'{NAME}: top-1 {top1:.3f} %' in capsys.readouterr().out
