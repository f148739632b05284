"""`timm-spinal publish --head-only` against the test Hub: the head goes there, the backbone comes from where it was."""
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.hub.options import PublishOptions
from timm_spinal.hub.package import built
from timm_spinal.hub.publication import open_model
from timm_spinal.models.head_only import hash_tensors
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.train import train

from .conftest import REPO, digits_config, files, new_cache, send, serve
from .store import Blob, Repo

pytestmark = pytest.mark.usefixtures('quick')
BACKBONE, AT_HOME = 'test_resnet.r160_in1k', 'timm/test_resnet.r160_in1k'
OPTIONS = PublishOptions(REPO, licence='mit', head_only=True)


def backbone(seed=3):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet').eval()


@pytest.fixture
def base(hub):
    """The plain model whose weights are on the Hub under timm's name."""
    serve(hub, backbone(), AT_HOME)
    return backbone()


def train_frozen(folder, **options) -> TrainConfig:
    train(digits_config(folder, **{**dict(
        model='test_resnet_attn', model_kwargs=dict(head_queries=4), pretrained=True, freeze='backbone', img_size=32,
        epochs=1), **options}))
    return folder / 'run'


def new_head(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', pretrained=True)
    return timm_spinal.attach_head(model, 'pspinal', num_classes=5, **kwargs)


def test_a_head_is_published_and_loads_with_its_backbone(hub, base, tmp_path, monkeypatch, capsys):
    run = train_frozen(tmp_path / 'runs')
    assert send(run, '--head-only') == 0
    (tmp_path / 'w').write_bytes(files(hub)['model.safetensors'])
    whole = load_file(run / 'model.safetensors')
    head = {name: value for name, value in whole.items() if name.startswith('attached_head.')}
    sent = load_file(tmp_path / 'w')
    assert sent.keys() == head.keys() and all(torch.equal(sent[name], head[name]) for name in head)
    rest = {name: value for name, value in base.state_dict().items() if not name.startswith('fc.')}
    with safe_open(tmp_path / 'w', 'pt') as f:
        assert f.metadata() == {'format': 'pt', 'backbone': BACKBONE, 'backbone_sha256': hash_tensors(rest)}
    assert (tmp_path / 'w').stat().st_size < (run / 'model.safetensors').stat().st_size
    assert 'The file holds the head alone' in files(hub)['README.md'].decode()
    assert 'transformers, after' not in files(hub)['README.md'].decode()

    new_cache(monkeypatch, tmp_path / 'user')
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert model.state_dict().keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    other = timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=3).eval()  # a new classifier, as ever
    assert torch.equal(other.attached_head.hidden.queries, whole['attached_head.hidden.queries'])
    maps = timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True).eval()
    assert torch.equal(maps(torch.ones(1, 3, 32, 32))[-1], model.forward_features(torch.ones(1, 3, 32, 32)))
    capsys.readouterr()
    assert main(['verify', REPO]) == 0 and 'loads, card complete, golden tensors differ by' in capsys.readouterr().out


def test_again_changes_nothing(hub, base, tmp_path):
    run = train_frozen(tmp_path / 'runs')
    assert send(run, '--head-only') == 0
    before = dict(hub.store.repos[REPO].commits)
    assert send(run, '--head-only') == 0 and hub.store.repos[REPO].commits == before


def test_a_backbone_of_another_hash_is_refused(hub, base, tmp_path, monkeypatch, capsys):
    with built(open_model(new_head()), OPTIONS) as package:
        serve(hub, backbone(seed=4), AT_HOME)
        new_cache(monkeypatch, tmp_path / 'user')
        name = f'local-dir:{package.folder}'
        with pytest.raises(RuntimeError, match=f'trained on other weights than {BACKBONE} has now') as error:
            timm.create_model(name, pretrained=True)
        assert isinstance(error.value, UserError) and '\n' not in str(error.value)
        assert main(['validate', '--model', name, '--pretrained', '--dataset', 'digits', '--workers', '0']) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1 and 'holds a head alone' in err


def test_a_backbone_that_is_not_there_is_one_line(hub, base, tmp_path, monkeypatch):
    with built(open_model(new_head()), OPTIONS) as package:
        del hub.store.repos[AT_HOME]
        new_cache(monkeypatch, tmp_path / 'user')
        with pytest.raises(UserError, match=f'holds a head alone, and its backbone is not there: {BACKBONE}') as error:
            timm.create_model(f'local-dir:{package.folder}', pretrained=True)
        assert '\n' not in str(error.value)


def test_a_file_of_a_head_alone_loads_by_its_path(hub, base):
    model = new_head()
    with built(open_model(model), OPTIONS) as package:
        again = timm.create_model(
            'test_resnet_pspinal', pretrained=True, num_classes=5,
            pretrained_cfg_overlay=dict(file=str(package.folder / 'model.safetensors')))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_backbone_may_be_a_repository(hub, tmp_path, monkeypatch):
    """A whole model of the Hub, a new head on its frozen backbone."""
    serve(hub, backbone(), AT_HOME)
    with built(open_model(new_head()), PublishOptions('me/whole', licence='mit')) as package:
        content = {p.name: p.read_bytes() for p in package.folder.iterdir() if p.is_file()}
    hub.store.repos['me/whole'] = Repo('me/whole')
    hub.store.add_large(content['model.safetensors'])
    hub.store.repos['me/whole'].add_commit('main', {
        name: Blob(data, large=name == 'model.safetensors') for name, data in content.items()}, 'all')
    model = timm.create_model('hf-hub:me/whole', pretrained=True)
    torch.manual_seed(1)
    timm_spinal.attach_head(model, 'attn', num_classes=4)
    timm_spinal.ensure_registered('test_resnet_attn')
    with built(open_model(model), OPTIONS) as package:
        with safe_open(package.folder / 'model.safetensors', 'pt') as f:
            assert f.metadata()['backbone'] == 'hf-hub:me/whole'
        new_cache(monkeypatch, tmp_path / 'user')
        again = timm.create_model(f'local-dir:{package.folder}', pretrained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_half_precision_is_of_the_head(hub, base):
    model = new_head()
    with built(open_model(model), PublishOptions(REPO, licence='mit', head_only=True, dtype='fp16')) as package:
        assert {v.dtype for v in load_file(package.folder / 'model.safetensors').values()} == {torch.float16}
        again = timm.create_model(f'local-dir:{package.folder}', pretrained=True).state_dict()
    for name, value in model.state_dict().items():
        rounded = value.half().float() if name.startswith('attached_head.') else value
        assert torch.equal(again[name], rounded)


@pytest.mark.slow
def test_a_head_without_a_named_backbone_is_refused(hub, base, tmp_path, capsys):
    run = train_frozen(tmp_path / 'trained', freeze='none')
    assert send(run, '--head-only') == 2
    assert f'--head-only: the backbone is not that of {BACKBONE} any more (' in capsys.readouterr().err
    run = train_frozen(tmp_path / 'random', pretrained=False, model='test_resnet_pspinal', model_kwargs={})
    assert send(run, '--head-only') == 2 and 'started from no weights with a name' in capsys.readouterr().err
    run = train_frozen(tmp_path / 'small', pretrained=False, freeze='none', model='spinalcnn_a1', model_kwargs={},
                       img_size=None)
    assert send(run, '--head-only') == 2 and 'spinalcnn_a1 has no attached head' in capsys.readouterr().err
    assert main(['publish', str(run), '--local', 'x', '--head-only', '--license', 'mit']) == 2
    assert '--head-only: works only with --repo' in capsys.readouterr().err
    assert REPO not in hub.store.repos


def test_a_head_whose_file_names_no_backbone_is_refused(hub, base):
    with built(open_model(new_head()), OPTIONS) as package:
        file = package.folder / 'model.safetensors'
        save_file(load_file(file), file, metadata={'format': 'pt'})
        with pytest.raises(UserError, match='holds a head only, nothing of the backbone'):
            timm.create_model(f'local-dir:{package.folder}', pretrained=True)
