"""Licences: all that the Hub takes, by its id or by name and link."""
import json
import re

import pytest
import timm
from huggingface_hub import ModelCard

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.hub.card_check import check_card
from timm_spinal.hub.licences import LICENCES, Licence, choose_licence

from .conftest import REPO, files, new_cache, send
from .test_push import train_with

pytestmark = pytest.mark.usefixtures('quick')

NAMED = ('--license-name', 'my-licence-1.0', '--license-link', 'https://example.org/licence')


def card(hub, revision='main'):
    return ModelCard(files(hub, revision)['README.md'].decode()).data


def test_every_licence_of_timms_weights_is_taken():
    """Each becomes an id of the Hub, or 'other' with timm's word for it and where it is told."""
    refused, named, count = [], set(), 0
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name)
        page = f'https://hf.co/{cfg.hf_hub_id}'
        if cfg.license in (None, 'unknown'):
            continue
        count += 1
        try:
            licence = choose_licence(Licence(''), cfg.license, page)
        except UserError as e:
            refused.append((name, str(e)))
            continue
        assert licence.spoken == cfg.license
        if licence.id == 'other':
            named.add(licence.name)
            assert licence.link == page
        else:
            assert licence == (cfg.license, '', '')
    assert refused == [] and count > 2000
    assert {'dinov3-license', 'cvnets-license', 'fastvit-license', 'seer-license'} <= named
    assert not named & LICENCES and not {'apple-ascl', 'apple-amlr', 'fair-noncommercial-research-license'} & named


@pytest.mark.parametrize('licence', ['llama3.3', 'eupl-1.2', 'openmdw-1.1', 'unknown', 'Apache-2.0'])
def test_ids_of_the_hub(hub, run, licence):
    assert send(run, licence=licence) == 0
    assert card(hub).license == licence.lower()
    assert json.loads(files(hub)['config.json'])['pretrained_cfg']['license'] == licence.lower()


@pytest.mark.slow
def test_another_licence_by_name_and_link(hub, run, tmp_path, monkeypatch):
    assert send(run, *NAMED, licence='other') == 0
    data = card(hub)
    assert (data.license, data.license_name, data.license_link) == ('other', *NAMED[1::2])
    assert json.loads(files(hub)['config.json'])['pretrained_cfg']['license'] == 'my-licence-1.0'
    assert main(['verify', REPO]) == 0
    # what starts from these weights has their licence, which is told on their page
    new_cache(monkeypatch, tmp_path / 'user')
    assert train_with(tmp_path / 'tuned', '--push-to-hub', 'me/tuned', model=f'hf-hub:{REPO}', pretrained=True) == 0
    data = ModelCard(hub.store.repos['me/tuned'].files()['README.md'].data.decode()).data
    assert (data.license, data.license_name) == ('other', 'my-licence-1.0')
    assert data.license_link == f'https://hf.co/{REPO}' and data.base_model == REPO


def test_text_of_a_licence_in_the_repository(hub, run, capsys):
    named = ('--license-name', 'mine', '--license-link', 'LICENSE')
    assert send(run, *named, licence='other') == 2
    err = capsys.readouterr().err
    assert f'{run / "LICENSE"} is not a file; put the text of the licence there' in err and hub.store.repos == {}
    (run / 'LICENSE').write_text('Do as you like.\n')
    assert send(run, *named, licence='other') == 0 and send(run, *named, licence='other') == 0
    assert files(hub)['LICENSE'] == b'Do as you like.\n' and card(hub).license_link == 'LICENSE'
    assert len(hub.store.repos[REPO].commits) == 2
    assert send(run) == 0 and 'LICENSE' in files(hub), "a user's own file stays"


@pytest.mark.parametrize('flags, licence, text', [
    ((), 'other', "licence 'other' needs a name; add --license-name, and --license-link"),
    (NAMED, '', '--license-name and --license-link only go with --license other; add it'),
    (NAMED[2:], '', 'only go with --license other'),
    (NAMED, 'mit', '--license mit: it is a licence id of the Hub, which knows its name and text; leave out '
                   '--license-name'),
    ((*NAMED[:2], '--license-link', 'nowhere'), 'other', '--license-link nowhere: it is not an address'),
    ((), 'dinov3-license', '--license other --license-name dinov3-license --license-link ADDRESS'),
])
def test_what_does_not_go_together(hub, run, capsys, flags, licence, text):
    assert send(run, *flags, licence=licence) == 2
    err = capsys.readouterr().err
    assert text in err and err.count('\n') == 1 and hub.store.repos == {}


def test_in_the_trainer(hub, tmp_path, capsys):
    named = [word.replace('--license', '--hub-license') for word in NAMED]
    assert train_with(tmp_path, '--push-to-hub', REPO, '--hub-license', 'other') == 2
    assert 'add --hub-license-name, and --hub-license-link' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()
    assert train_with(tmp_path, '--push-to-hub', REPO, '--hub-license', 'other', *named, epochs=1) == 0
    data = card(hub)
    assert (data.license, data.license_name, data.license_link) == ('other', *NAMED[1::2])


@pytest.mark.parametrize('of_start', [None, 'unknown', 'other'])
def test_weights_that_name_no_licence(of_start):
    with pytest.raises(UserError, match='no licence is given, and the weights that training started from .*; choose'):
        choose_licence(Licence(''), of_start)


def test_card_of_another_licence_needs_its_name(hub, run):
    assert send(run, *NAMED, licence='other') == 0
    text = files(hub)['README.md'].decode()
    assert check_card(text).license_name == 'my-licence-1.0'
    with pytest.raises(UserError, match="licence 'other' needs a name"):
        check_card(re.sub('license_name: .*\n', '', text))
