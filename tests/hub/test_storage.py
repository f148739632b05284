"""The test Hub as Xet's storage: hf_xet sends and fetches, and the server reads all that it gets."""
import json
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from .conftest import new_cache
from .test_server import push

TEXT = b''.join(b'%d bottles of beer on the wall\n' % i for i in range(20_000))
NOISE = bytes((i * i * 7919 >> 7) % 256 for i in range(300_000))
FILES = {'a.txt': b'text', 'model.safetensors': TEXT, 'sub/noise.bin': NOISE, 'zero.bin': bytes(200_000)}


def content(names=FILES) -> dict[str, bytes]:
    return {name: Path(hf_hub_download('me/thing', name)).read_bytes() for name in names}


@pytest.mark.parametrize('policy, kinds', [
    ('auto', {0, 1, 2}), ('none', {0}), ('lz4', {0, 1}), ('bg4-lz4', {0, 2})])
def test_chunks_of_all_kinds(hub, monkeypatch, policy, kinds):
    """The server has decoded them, as the checked SHA-256 of each file shows, and the client does it again."""
    monkeypatch.setenv('HF_XET_XORB_COMPRESSION_POLICY', policy)
    push(hub, files=FILES)
    assert {name: blob.data for name, blob in hub.store.repos['me/thing'].files().items() if name in FILES} == FILES
    found = Counter(chunk.kind for xorb in hub.store.xorbs.values() for chunk in xorb.chunks)
    assert set(found) <= kinds and found.total() > 5 and (policy == 'none' or max(found) == max(kinds))
    assert content() == FILES and hub.count('GET', '/xorbs/') >= 3 and hub.count('GET', '/cdn/') == 0
    assert hub.count('PUT', 'lfs-put') == 0 and hub.cdn_tokens == []


@pytest.mark.parametrize('status', [404, 501])
def test_clients_and_servers_of_the_first_version(hub, status):
    hub.fail('status', 'POST', '/cas/v2/', times=99, status=status)
    hub.fail('status', 'GET', '/cas/v2/', times=99, status=status)
    push(hub, files=FILES)
    assert content() == FILES
    assert hub.count('POST', '/cas/v1/shards') == 1 and hub.count('GET', '/cas/v1/reconstructions') == 3


def test_known_content_is_not_sent_again(hub):
    push(hub, files=FILES)
    sent = hub.count('POST', '/xorbs/')
    push(hub, repo='me/other', files={'model.safetensors': TEXT})
    assert hub.count('POST', '/xorbs/') == sent and hub.count('POST', '/cas/v2/shards') == 2
    assert Path(hf_hub_download('me/other', 'model.safetensors')).read_bytes() == TEXT
    mixed = TEXT[:250_000] + NOISE[::-1] + TEXT[350_000:]  # of the first xorb, two ranges
    push(hub, repo='me/other', files={'model.safetensors': mixed})
    assert Path(hf_hub_download('me/other', 'model.safetensors')).read_bytes() == mixed


def test_whole_repositories_and_files_that_came_another_way(hub, monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        m.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        push(hub, files=FILES)
    assert hub.count('POST', '/cas/') == 0
    folder = Path(snapshot_download('me/thing'))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert hub.count('GET', '/xorbs/') > 0 and hub.count('GET', '/cdn/') == 0


def ask(hub, path, token, body=None, **headers):
    host = hub.cdn if path.startswith('/cas/') else hub.url
    request = urllib.request.Request(host + path, body, {'Authorization': f'Bearer {token}', **headers})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def refused(*args, **headers) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(*args, **headers)
    return error.value.code


@pytest.mark.parametrize('version', ['v1', 'v2'])
@pytest.mark.parametrize('first, last', [(0, 9), (140_000, 299_999), (299_990, 400_000), (0, 299_999)])
def test_ranges_of_a_file(hub, version, first, last):
    push(hub, files=FILES)
    token = ask(hub, '/api/models/me/thing/xet-read-token/main', 'hf_writer')['accessToken']
    sha256 = hub.store.repos['me/thing'].files()['sub/noise.bin'].sha256
    path = f'/cas/{version}/reconstructions/{hub.store.xet_hash[sha256]}'
    answer = ask(hub, path, token, Range=f'bytes={first}-{last}')
    data = b''
    for term in answer['terms']:
        found = hub.store.xorbs[term['hash']].data(term['range']['start'], term['range']['end'])
        assert len(found) == term['unpacked_length']
        data += found
    skip = answer['offset_into_first_range']
    assert data[skip:][:last + 1 - first] == NOISE[first:last + 1]
    assert len(data) < len(NOISE) or last - first > 2e5, 'no more chunks than needed'
    assert refused(hub, path, token, Range='bytes=300000-300001') == 416


def test_what_is_refused(hub, monkeypatch, tmp_path):
    push(hub, files=FILES)
    read, write = (ask(hub, f'/api/models/me/thing/xet-{kind}-token/main', 'hf_writer')['accessToken']
                   for kind in ('read', 'write'))
    assert refused(hub, '/api/models/me/thing/xet-write-token/main', 'hf_stranger') == 403
    assert refused(hub, '/api/models/me/none/xet-read-token/main', 'hf_writer') == 404
    assert refused(hub, '/api/models/me/thing/xet-read-token/none', 'hf_writer') == 404
    xorb = next(iter(hub.store.xorbs.values())).body
    codes = [refused(hub, '/cas/v1/xorbs/default/ab', token, body) for token, body in (
        ('hf_writer', xorb), (read, xorb), (write, xorb[:-1]), (write, b'\1' + xorb[1:]))]
    assert codes == [401, 403, 400, 400] and 'ab' not in hub.store.xorbs
    assert refused(hub, '/cas/v2/shards', write, b'nonsense') == 400
    hub.store.repos['me/thing'].private = True
    new_cache(monkeypatch, tmp_path / 'other')
    assert content() == FILES and refused(hub, '/api/models/me/thing/xet-read-token/main', 'hf_stranger') == 404
