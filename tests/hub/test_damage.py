"""Files that came from the Hub and are not what was uploaded are refused, others never, however they are kept."""
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants, file_download, hf_hub_download

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.detection.backbone import create_body
from timm_spinal.errors import UserError
from timm_spinal.models.hub_checksums import checksum_on_hub, is_damaged
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.model import create_model
from timm_spinal.training.teacher import load_teacher

from .conftest import REPO, new_cache, send, serve
from .store import Blob, Repo

WEIGHTS, CONFIG = b'\0\xff' * 50_000, b'{"a": 1}\n'


@pytest.fixture
def thing(hub):
    """A repository with a large and a small file."""
    repo = hub.store.repos['me/thing'] = Repo('me/thing')
    hub.store.add_large(WEIGHTS)
    repo.add_commit('main', {'sub/model.safetensors': Blob(WEIGHTS, large=True), 'config.json': Blob(CONFIG)}, 'all')
    return repo


def no_links(monkeypatch) -> None:
    """As on Windows without developer mode."""
    def refuse(*_, **__):
        raise OSError('symbolic link privilege not held')

    monkeypatch.setattr(os, 'symlink', refuse)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS_WARNING', True)
    monkeypatch.setattr(file_download, '_are_symlinks_supported_in_dir', {})


def fetch(layout, monkeypatch, tmp_path) -> list[Path]:
    """Both files, kept in one of the ways in which huggingface_hub and its users keep them."""
    if layout == 'no links':
        no_links(monkeypatch)
    if layout == 'no shared store':
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SHARED_BLOBS', True, raising=False)
    if layout == 'no xet':
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    where = dict(local_dir=tmp_path / 'here') if layout == 'local_dir' else {}
    found = [Path(hf_hub_download('me/thing', name, **where)) for name in ('sub/model.safetensors', 'config.json')]
    if layout == 'copied without links':
        cache = Path(constants.HF_HUB_CACHE)
        shutil.copytree(cache / 'models--me--thing/snapshots', tmp_path / 'copy/models--me--thing/snapshots')
        found = [tmp_path / 'copy' / path.relative_to(cache) for path in found]
    if layout == 'linked by the user':
        for path in found:
            (tmp_path / path.name).symlink_to(path)
        found = [tmp_path / path.name for path in found]
    return found


@pytest.mark.parametrize('layout', [
    'as ever', 'no shared store', 'no xet', 'no links', 'copied without links', 'linked by the user', 'local_dir'])
def test_intact_and_damaged_files(thing, layout, monkeypatch, tmp_path):
    for path, blob in zip(fetch(layout, monkeypatch, tmp_path), (thing.files()['sub/model.safetensors'], Blob(CONFIG))):
        assert checksum_on_hub(path) == blob.oid and not is_damaged(path)
        flip(path)
        assert is_damaged(path)


def flip(path) -> None:
    """One byte of a file, as it would have come over the wire; its times stay."""
    real = path.resolve()
    times, data = real.stat(), bytearray(real.read_bytes())
    data[len(data) // 2] ^= 1
    real.chmod(0o644)
    real.write_bytes(data)
    os.utime(real, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_shared_store_is_what_the_client_uses(thing, monkeypatch, tmp_path):
    """Otherwise the first layout above would be no other than the second."""
    if not hasattr(constants, 'HF_HUB_DISABLE_SHARED_BLOBS'):
        pytest.skip('huggingface_hub before 1.32')
    path = fetch('as ever', monkeypatch, tmp_path)[0]
    assert path.resolve().parents[1] == Path(constants.HF_HUB_CACHE) / 'blobs'


def test_second_repository_shares_a_damaged_file(hub, thing, monkeypatch, tmp_path):
    flip(fetch('as ever', monkeypatch, tmp_path)[0])
    hub.store.repos['me/other'] = Repo('me/other')
    hub.store.repos['me/other'].add_commit('main', thing.files(), 'the same')
    path = Path(hf_hub_download('me/other', 'sub/model.safetensors'))
    shared = hasattr(constants, 'HF_HUB_DISABLE_SHARED_BLOBS')
    assert is_damaged(path) == shared
    path.resolve().unlink()
    assert not is_damaged(Path(hf_hub_download('me/other', 'sub/model.safetensors', force_download=not shared)))


def test_nothing_is_said_of_what_is_not_known(hub, thing, monkeypatch, tmp_path):
    """Offline and without links, and of files that their owner has changed or that were never on the Hub."""
    own = tmp_path / 'model.safetensors'
    own.write_bytes(b'mine')
    (tmp_path / 'blobs').mkdir()
    shutil.copy(own, tmp_path / 'blobs/model.safetensors')
    assert not is_damaged(own) and not is_damaged(tmp_path / 'blobs/model.safetensors')
    changed = fetch('local_dir', monkeypatch, tmp_path)[1]
    changed.write_bytes(b'{"a": 2}\n')
    os.utime(changed, (changed.stat().st_mtime + 60,) * 2)
    assert not is_damaged(changed)
    path = fetch('no links', monkeypatch, tmp_path)[0]
    flip(path)
    hub.fail('status', 'HEAD', '/resolve/', status=503, times=1)
    assert not is_damaged(path) and is_damaged(path)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert not is_damaged(path)


# ---- models -----------------------------------------------------------------------------------------------------

DAMAGED = 'its weights are damaged .another checksum than on the Hub.; delete /'
TIMM = 'timm/test_resnet.r160_in1k'


def create(name, **options):
    return create_model(ValidateConfig(model=name, pretrained=True, **options), None)


LOADS = {
    'by name': lambda: create('test_resnet'),
    'a backbone with a head': lambda: create('test_resnet_spinal'),
    'teacher': lambda: load_teacher('test_resnet'),
    'detector': lambda: create_body('test_resnet', True, {}),
}


@pytest.fixture
def weights(hub):
    """Weights on the test Hub where timm looks for those of test_resnet."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet')
    serve(hub, model, TIMM)
    timm_spinal.ensure_registered('test_resnet_spinal')
    return model.conv1[0].weight if isinstance(model.conv1, torch.nn.Sequential) else model.conv1.weight


@pytest.mark.usefixtures('both_ways')
@pytest.mark.parametrize('load', LOADS)
def test_weights_of_a_name(hub, weights, load):
    """Those of the Hub load, those that came with another byte are refused, and are fetched again once deleted."""
    hub.fail('corrupt', 'GET', '/(cdn|xorbs)/')
    with pytest.raises(UserError, match=DAMAGED) as error:
        LOADS[load]()
    assert str(error.value).startswith(('model test_resnet', 'teacher test_resnet: ', 'backbone test_resnet: '))
    Path(str(error.value).partition('delete ')[2].partition(' and try')[0]).unlink()
    state = LOADS[load]().state_dict()
    assert any(value.shape == weights.shape and torch.equal(value, weights) for value in state.values())


@pytest.mark.parametrize('load', ['by name', 'teacher'])
def test_weights_that_do_not_even_load(hub, weights, load):
    """The checksum tells it, whatever error the weights raise; also those that timm keeps in torch's own format."""
    hub.store.repos.clear()
    serve(hub, timm.create_model('test_resnet'), TIMM, name='pytorch_model.bin')
    LOADS[load]()
    path = Path(hf_hub_download(TIMM, 'pytorch_model.bin')).resolve()
    for keep in (path.stat().st_size // 2, 1, 0):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=DAMAGED):
            LOADS[load]()


def test_config_and_folders(hub, run, monkeypatch, tmp_path, capsys):
    """A config in the cache, and a publication that was downloaded into a folder."""
    assert send(run) == 0
    new_cache(monkeypatch, tmp_path / 'user')
    name = f'hf-hub:{REPO}'
    config = Path(hf_hub_download(REPO, 'config.json')).resolve()
    config.write_bytes(config.read_bytes()[:100])
    with pytest.raises(UserError, match=f'model {name}: its config.json is damaged .*delete {config} and try again'):
        create(name)
    config.unlink()
    create(name)
    for file in ('config.json', 'model.safetensors'):
        hf_hub_download(REPO, file, local_dir=tmp_path / 'here')
    create(f'local-dir:{tmp_path / "here"}')
    flip(tmp_path / 'here/model.safetensors')
    with pytest.raises(UserError, match=f'its weights are damaged .* delete {tmp_path}/here/model.safetensors'):
        create(f'local-dir:{tmp_path / "here"}')
    with pytest.raises(UserError, match=f'its weights are damaged .* delete {tmp_path}/here/model.safetensors'):
        create('spinalcnn_a1', pretrained_path=str(tmp_path / 'here/model.safetensors'))


@pytest.mark.parametrize('layout', ['as ever', 'no links'])
def test_verify_refuses_what_came_damaged(hub, run, layout, monkeypatch, tmp_path, capsys):
    assert send(run) == 0
    if layout == 'no links':
        no_links(monkeypatch)
    assert main(['verify', REPO]) == 0
    hub.fail('corrupt', 'GET', '/xorbs/')  # the first large file that comes
    assert main(['verify', REPO]) == 2
    assert capsys.readouterr().err == (
        f'error: {REPO}: confusion.png was damaged in the download (its checksum is not that of the Hub); try again\n')
