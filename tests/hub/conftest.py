"""A fresh Hub, an empty cache and a token for every test; the client is huggingface_hub's own."""
import io
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _xet, close_session
from safetensors.torch import save

from timm_spinal.cli import main
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.train import train

from ..conftest import THE_HUB
from .store import Blob, Repo

REPO = 'me/digits'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The test Hub, empty, with the client set to talk to it as user 'me' from an empty cache."""
    assert THE_HUB.url == constants.ENDPOINT, 'huggingface_hub was imported before tests/conftest.py'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    new_cache(monkeypatch, tmp_path / 'cache')
    THE_HUB.reset()
    THE_HUB.start()
    yield THE_HUB
    close_session()


def new_cache(monkeypatch, folder) -> None:
    """From now on the client's cache is this folder, and it knows nothing of what Xet's storage has sent or taken."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(folder))
    monkeypatch.setenv('HF_XET_CACHE', f'{folder}_xet')
    getattr(_xet, 'abort_xet_session', lambda: None)()  # the next one reads the environment; clients of 1.18 have none
    getattr(_xet, 'XET_CONNECTION_INFO_CACHE', {}).clear()


@pytest.fixture
def no_xet(monkeypatch):
    """Large files go the way of clients without hf_xet: git LFS, and plain HTTP from another host."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)


@pytest.fixture(params=['xet', 'no xet'])
def both_ways(request, hub):
    """The test runs twice, with Xet and without; and its large files did not come another way."""
    if request.param == 'no xet':
        request.getfixturevalue('no_xet')
    yield
    assert (hub.count('GET', '/xorbs/') > 0, hub.count('GET', '/cdn/') > 0) == (
        request.param == 'xet', request.param == 'no xet')


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A short run on the digits, finished, with a moving average."""
    folder = tmp_path_factory.mktemp('runs')
    train(digits_config(folder, model_ema=True, model_ema_decay=0.9))
    return folder / 'run'


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run folder to change."""
    return Path(shutil.copytree(trained, tmp_path / 'run'))


def digits_config(folder, **options) -> TrainConfig:
    defaults = dict(
        model='spinalcnn_a1', dataset='digits', batch_size=64, workers=0, epochs=2, opt='adamw', lr=0.004,
        warmup_epochs=0, smoothing=0., no_aug=True, output=str(folder), experiment='run', seed=5, log_interval=1000)
    return TrainConfig(**{**defaults, **options})


@pytest.fixture
def full_disk():
    """``with full_disk(n)``: the operating system refuses to write files beyond n bytes."""
    @contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def quick(monkeypatch):
    """The waits between tries, ours and the client's, a thousand times shorter, and those of hf_xet too."""
    monkeypatch.setenv('HF_XET_CLIENT_RETRY_BASE_DELAY', '1ms')
    monkeypatch.setattr(time, 'sleep', lambda seconds, sleep=time.sleep: sleep(seconds / 1000))


def send(run, *flags, repo=REPO, licence='mit') -> int:
    """Publish a run folder by the command line; returns the exit code."""
    return main(['publish', str(run), '--repo', repo, *(['--license', licence] if licence else []), *flags])


def serve(hub, model, repo, name='model.safetensors') -> None:
    """Put the weights of a timm model where timm looks for them."""
    data = save(model.state_dict()) if name.endswith('.safetensors') else _pickled(model)
    hub.store.repos[repo] = Repo(repo)
    hub.store.add_large(data)
    hub.store.repos[repo].add_commit('main', {name: Blob(data, large=True)}, 'weights')


def _pickled(model) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def files(hub, revision='main', repo=REPO) -> dict[str, bytes]:
    """What a repository of the test Hub holds."""
    found = dict(hub.store.repos[repo].files(revision))
    found.pop('.gitattributes')
    return {path: blob.data for path, blob in found.items()}
