"""`--push-to-hub`: what the trainer publishes, and that training does not notice; fine-tuning from end to end."""
from dataclasses import asdict

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from timm_spinal.cli import main
from timm_spinal.hub.package import FILES
from timm_spinal.training.parser import load_yaml

from ..training.images import make_folder
from ..training.runs import assert_same_state
from .conftest import REPO, digits_config, files, new_cache, send

pytestmark = pytest.mark.usefixtures('quick')


def train_with(folder, *flags, **options) -> int:
    """The trainer's command line with the options of `digits_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'run.yaml').write_text(yaml.safe_dump(asdict(digits_config(folder, **options))))
    return main(['train', '--config', str(folder / 'run.yaml'), *flags])


PUSH = ('--push-to-hub', REPO, '--hub-license', 'mit')


@pytest.mark.usefixtures('both_ways')
def test_best_weights_at_the_end(hub, tmp_path, capsys):
    assert train_with(tmp_path, *PUSH, '--hub-private') == 0
    assert hub.store.repos[REPO].private and set(files(hub)) == set(FILES)
    assert files(hub)['model.safetensors'] == (tmp_path / 'run' / 'model.safetensors').read_bytes()
    assert len(hub.store.repos[REPO].commits) == 2
    assert f'published {REPO} at' in capsys.readouterr().out
    assert send(tmp_path / 'run') == 0 and len(hub.store.repos[REPO].commits) == 2, 'publish makes the same files'


@pytest.mark.slow
def test_every_n_epochs_and_training_does_not_notice(hub, tmp_path, capsys):
    plain, pushed = tmp_path / 'plain', tmp_path / 'pushed'
    assert train_with(plain, epochs=3, drop=0.1) == 0
    hub.fail('status', 'POST', 'repos/create', status=403)  # the first push fails, the others do not
    assert train_with(pushed, *PUSH, '--push-interval', '1', epochs=3, drop=0.1) == 0
    assert 'warning: not published after epoch 0: me/digits: the token may not do this' in capsys.readouterr().out
    assert list(hub.store.repos[REPO].titles.values()) == ['new'] + 2 * ['spinalcnn_a1 from timm_spinal']
    assert_same_state(digits_config(plain), digits_config(pushed))
    assert load_yaml(pushed / 'run' / 'args.yaml').keys() == load_yaml(plain / 'run' / 'args.yaml').keys()
    assert b'hf_writer' not in b''.join(p.read_bytes() for p in pushed.rglob('*') if p.is_file())


def test_what_fails_at_the_end_can_be_done_again(hub, tmp_path, capsys):
    hub.fail('status', 'POST', '/commit/', status=403)
    assert train_with(tmp_path, *PUSH) == 2
    err = capsys.readouterr().err
    command = f'timm-spinal publish {tmp_path / "run"} --repo {REPO}'
    assert f'(trained, but not published; try again with {command})' in err and err.count('\n') == 1
    assert hub.store.repos == {} and send(tmp_path / 'run') == 0


@pytest.mark.parametrize('flags, token, text', [
    (('--push-to-hub', REPO), 'hf_writer', 'no licence'),
    (('--push-to-hub', REPO, '--hub-license', 'nonsense'), 'hf_writer', "licence 'nonsense' is not a licence id of the "
                                                                        "Hub"),
    (('--push-to-hub', 'a/b/c', '--hub-license', 'mit'), 'hf_writer', "'a/b/c': it is not a repository name"),
    (PUSH, '', 'no token of the Hub'),
    (PUSH, 'hf_reader', 'may only read'),
    ((*PUSH, '--model', 'nonsense'), 'hf_writer', "unknown model 'nonsense'"),
])
def test_what_is_wrong_shows_before_training(hub, tmp_path, capsys, monkeypatch, flags, token, text):
    monkeypatch.setenv('HF_TOKEN', token)
    assert train_with(tmp_path, *flags) == 2
    err = capsys.readouterr().err
    assert text in err and err.count('\n') == 1 and not (tmp_path / 'run').exists() and hub.store.repos == {}


@pytest.mark.slow
def test_fine_tuning_from_end_to_end(hub, run, tmp_path, monkeypatch, launch):
    """Publish, download in a clean cache, fine-tune in two processes on other data, publish with `base_model`."""
    assert send(run, '--tag', 'v1') == 0
    make_folder(tmp_path / 'images', per_class=20, size=28)
    for name, value in dict(HF_HUB_OFFLINE='0', HF_HUB_CACHE=tmp_path / 'clean', HF_HOME=tmp_path / 'home').items():
        monkeypatch.setenv(name, str(value))
    done = launch(
        2, '-m', 'timm_spinal.train', '--model', f'hf-hub:{REPO}@v1', '--pretrained', '--data-dir',
        str(tmp_path / 'images'), '--output', str(tmp_path), '--experiment', 'tuned', '--epochs', '2', '--batch-size',
        '4', '--lr', '1e-7', '--warmup-epochs', '0', '--workers', '0', '--push-to-hub', 'me/tuned', '--push-interval',
        '1', '--seed', '1')
    assert 'published me/tuned at' in done.stdout
    assert any((tmp_path / 'clean').rglob('model.safetensors'))
    data = ModelCard(files(hub, repo='me/tuned')['README.md'].decode()).data
    assert (data.base_model, data.license) == (REPO, 'mit')
    assert b'--num_processes 2' in files(hub, repo='me/tuned')['README.md']
    assert main(['verify', 'me/tuned', '--data-dir', str(tmp_path / 'images'), '--workers', '0']) == 0
    new_cache(monkeypatch, tmp_path / 'user')
    model = timm.create_model('hf-hub:me/tuned', pretrained=True)
    assert model.num_classes == 2 and model.pretrained_cfg['label_names'] == ['ant', 'bee']
    first = load_file(run / 'model.safetensors')
    for key, value in model.state_dict().items():
        if not key.startswith('head.fc.'):
            torch.testing.assert_close(value, first[key], rtol=0, atol=1e-5)
