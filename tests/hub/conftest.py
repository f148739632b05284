"""A fresh Hub, an empty cache and a token for every test; the client is huggingface_hub's own."""
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from ..conftest import THE_HUB


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The test Hub, empty, with the client set to talk to it as user 'me' from an empty cache."""
    assert constants.ENDPOINT == THE_HUB.url, 'huggingface_hub was imported before tests/conftest.py'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    new_cache(monkeypatch, tmp_path / 'cache')
    THE_HUB.reset()
    THE_HUB.start()
    yield THE_HUB
    close_session()


def new_cache(monkeypatch, folder) -> None:
    """From now on the client's cache is this folder."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(folder))
