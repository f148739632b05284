"""`timm-spinal publish` against the test Hub, by the real client."""
import json

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_spinal
from timm_spinal.hub.options import PublishOptions
from timm_spinal.hub.package import FILES, build_package, built
from timm_spinal.hub.publication import open_model
from timm_spinal.hub.publish import publish

from .conftest import REPO, files, new_cache, send

pytestmark = pytest.mark.usefixtures('quick')


@pytest.mark.usefixtures('both_ways')
def test_one_commit_that_timm_loads(hub, run, capsys, monkeypatch, tmp_path):
    assert send(run) == 0
    repo = hub.store.repos[REPO]
    assert len(repo.commits) == 2 and not repo.private and set(files(hub)) == set(FILES)
    out = capsys.readouterr().out
    assert 'downloaded again, and identical' in out and out.splitlines()[-1].startswith('published me/digits')
    new_cache(monkeypatch, tmp_path / 'user')
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    mine = load_file(run / 'model.safetensors')
    assert all(torch.equal(value, mine[key]) for key, value in model.state_dict().items())
    assert files(hub)['summary.csv'] == (run / 'summary.csv').read_bytes()
    assert files(hub)['curves.png'] == (run / 'curves.png').read_bytes()
    config = json.loads(files(hub)['config.json'])
    assert config['label_names'] == list('0123456789') and config['pretrained_cfg']['license'] == 'mit'
    (tmp_path / 'w').write_bytes(files(hub)['model.safetensors'])
    with safe_open(tmp_path / 'w', 'pt') as f:
        assert f.metadata() == {'format': 'pt'}


def test_again_changes_nothing(hub, run, capsys):
    assert send(run) == 0
    before = dict(hub.store.repos[REPO].commits)
    posts = hub.count('POST', '/commit/')
    assert send(run, '--tag', 'v1') == 0 and send(run, '--tag', 'v1') == 0
    assert hub.store.repos[REPO].commits == before and hub.count('POST', '/commit/') == posts == 1
    assert hub.store.repos[REPO].tags == {'v1': list(before)[-1]}


def test_files_that_a_new_publication_lacks_go(hub, run):
    assert send(run) == 0
    (run / 'curves.png').unlink()
    HfApi().upload_file(path_or_fileobj=b'mine', path_in_repo='notes.txt', repo_id=REPO)
    assert send(run) == 0
    assert set(files(hub)) == set(FILES) - {'curves.png'} | {'notes.txt'}


def test_private_branch_and_tag(hub, run, capsys):
    assert send(run, '--private', '--branch', 'next', '--tag', 'v2') == 0
    repo = hub.store.repos[REPO]
    assert repo.private and set(files(hub)) == set() and set(files(hub, 'next')) == set(FILES)
    assert repo.tags['v2'] == repo.branches['next']
    repo.private = False
    assert send(run, '--private') == 2 and 'exists and is public' in capsys.readouterr().err
    (run / 'curves.png').unlink()
    assert send(run, '--tag', 'v2') == 2 and 'the tag v2 is on another commit' in capsys.readouterr().err


def test_pull_request(hub, run, monkeypatch, capsys):
    HfApi().create_repo(REPO)
    monkeypatch.setenv('HF_TOKEN', 'hf_stranger')
    assert send(run, '--pull-request') == 0 and send(run, '--pull-request') == 0
    assert [p['author'] for p in hub.store.repos[REPO].pulls] == ['stranger']
    assert set(files(hub)) == set() and set(files(hub, 'refs/pr/1')) == set(FILES)
    assert 'refs/pr/1 has exactly these files already' in capsys.readouterr().out
    assert send(run, '--pull-request', '--branch', 'x') == 2


def test_own_namespace(hub, run):
    assert send(run, repo='digits') == 0 and REPO in hub.store.repos


@pytest.mark.parametrize('weights, name, column', [('raw', 'model', 'eval_top1'), ('ema', 'ema', 'ema_top1')])
def test_weights_of_the_last_checkpoint(hub, run, weights, name, column):
    assert send(run, '--weights', weights) == 0
    wanted = load_file(max((run / 'last').glob('step-*')) / f'{name}.safetensors')
    wanted = {k.removeprefix('module.'): v for k, v in wanted.items()}
    (run / 'sent').write_bytes(files(hub)['model.safetensors'])
    sent = load_file(run / 'sent')
    assert sent.keys() == wanted.keys() and all(torch.equal(sent[k], wanted[k]) for k in sent)
    rows = (run / 'summary.csv').read_text().splitlines()
    top1 = float(dict(zip(rows[0].split(','), rows[-1].split(',')))[column])
    assert f'value: {round(top1 / 100, 6)}' in files(hub)['README.md'].decode()


def test_half_precision(hub, run, tmp_path, monkeypatch):
    assert send(run, '--dtype', 'fp16') == 0
    (tmp_path / 'w').write_bytes(files(hub)['model.safetensors'])
    assert {v.dtype for v in load_file(tmp_path / 'w').values()} == {torch.float16}
    new_cache(monkeypatch, tmp_path / 'user')
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    mine = load_file(run / 'model.safetensors')
    assert all(torch.equal(v, mine[k].half().float()) for k, v in model.state_dict().items())


def test_dry_run_sends_nothing(hub, run, capsys, tmp_path):
    assert send(run, '--dry-run') == 0 and send(run, '--dry-run', '--output', str(tmp_path / 'out' / 'x')) == 0
    assert hub.log == [] and 'nothing was sent' in capsys.readouterr().out
    for folder in (run / 'hub', tmp_path / 'out' / 'x'):
        assert {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()} == set(FILES)
    assert send(run, '--dry-run', '--output', str(run)) == 2
    assert 'timm-spinal publish did not write it' in capsys.readouterr().err and (run / 'args.yaml').exists()


def test_model_of_an_unregistered_combination(hub, tmp_path, monkeypatch):
    """From memory; the card has the line that registers it, and with that line it loads in a fresh cache."""
    torch.manual_seed(0)
    model = timm_spinal.attach_head(timm.create_model('test_convnext2', num_classes=7), 'spinal', head_width=24).eval()
    options = PublishOptions('me/combination', licence='mit')
    with built(open_model(model), options) as package:
        publish(package, options, 'test')
        card = (package.folder / 'README.md').read_text()
    assert "timm_spinal.register_head_variant('test_convnext2', 'spinal')" in card
    assert 'Not recorded' in card and 'No accuracy' in card
    new_cache(monkeypatch, tmp_path / 'user')
    again = timm.create_model('hf-hub:me/combination', pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(again(x), model(x))


def test_tokens_are_nowhere(hub, run, capsys, tmp_path):
    hub.fail('status', 'POST', '/commit/', status=403)
    assert send(run, '--dry-run') == 0 and send(run) == 2
    said = capsys.readouterr()
    assert 'hf_writer' not in said.out + said.err
    written = b''.join(p.read_bytes() for p in run.rglob('*') if p.is_file())
    assert b'hf_writer' not in written


# ---- bad input --------------------------------------------------------------------------------------------------


def damage(run, change):
    weights = load_file(run / 'model.safetensors')
    change(weights)
    save_file(weights, run / 'model.safetensors')


BAD_RUNS = {
    'no run folder': (lambda run: (run / 'args.yaml').unlink(), 'is not a run folder'),
    'no best checkpoint': (lambda run: (run / 'model.safetensors').unlink(), 'contains no best checkpoint'),
    'unfinished': (lambda run: (run / 'result.json').unlink(), 'the run has not ended'),
    'unknown architecture': (
        lambda run: (run / 'config.json').write_text('{"architecture": "nonsense"}'), "unknown model 'nonsense'"),
    'broken config': (lambda run: (run / 'config.json').write_text('{'), 'config.json: cannot be read'),
    'broken weights': (lambda run: (run / 'model.safetensors').write_bytes(b'x'), 'model.safetensors: is damaged'),
    'NaN': (lambda run: damage(run, lambda w: w['head.fc.bias'].fill_(float('nan'))), 'head.fc.bias has NaN'),
    'lacking weights': (lambda run: damage(run, lambda w: w.pop('head.fc.bias')), 'head.fc.bias'),
}


@pytest.mark.parametrize('what', BAD_RUNS)
def test_bad_runs_are_one_line_and_nothing_is_sent(hub, run, what, capsys):
    spoil, text = BAD_RUNS[what]
    spoil(run)
    assert send(run) == 2
    err = capsys.readouterr().err
    assert text in err and err.startswith('error: ') and err.count('\n') == 1
    assert hub.store.repos == {} and not (run / 'hub').exists()


@pytest.mark.parametrize('flags, text', [
    (dict(repo='a/b/c'), "'a/b/c': it is not a repository name"),
    (dict(repo='me/-x'), "'me/-x': it is not a repository name"),
    (dict(repo='other/x'), "the token may not do this (You don't have the rights to write to the namespace"),
    (dict(licence='apache'), "licence 'apache' is not a licence id of the Hub; did you mean apache-2.0?"),
    (dict(licence=''), 'no licence is given, and the weights that training started from have none; choose'),
    (dict(licence='other'), "licence 'other' needs a name; add --license-name"),
])
def test_bad_options(hub, run, flags, text, capsys):
    assert send(run, **flags) == 2
    err = capsys.readouterr().err
    assert text in err and err.count('\n') == 1 and hub.store.repos == {}


@pytest.mark.parametrize('token, text', [
    ('', "no token of the Hub; log in with 'hf auth login', or set HF_TOKEN"),
    ('hf_reader', 'the token of me may only read'),
    ('hf_nobody', 'the token is not valid'),
])
def test_tokens_that_will_not_do(hub, run, token, text, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', token)
    assert send(run) == 2
    err = capsys.readouterr().err
    assert text in err and err.count('\n') == 1 and hub.store.repos == {}


def test_offline_nothing_is_sent(hub, run, monkeypatch, capsys):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert send(run) == 2 and hub.log == []
    assert 'HF_HUB_OFFLINE is set, so nothing can be sent; unset it (--dry-run' in capsys.readouterr().err
    assert send(run, '--dry-run') == 0


def test_values_beyond_half_precision(hub, run, capsys):
    damage(run, lambda w: w['head.fc.bias'].fill_(1e6))
    assert send(run, '--dtype', 'fp16') == 2
    assert 'head.fc.bias has values beyond the range of float16; publish it with --dtype fp32' in \
        capsys.readouterr().err


def test_tied_tensors_and_models_that_nothing_could_load(tmp_path):
    options = PublishOptions('me/x', licence='mit')

    def package(model):
        build_package(open_model(model), options, tmp_path / 'package', 'me/x', 'hf-hub:me/x')

    model = timm.create_model('spinalcnn_a1')
    model.again = model.head.fc
    with pytest.raises(ValueError, match='head.fc.weight and again.weight are one tensor under two names'):
        package(model)
    with pytest.raises(ValueError, match='Linear: timm.create_model did not make this model'):
        package(torch.nn.Linear(2, 2))
    direct = timm.model_entrypoint('spinalcnn_a1')(head_width=20)
    with pytest.raises(ValueError, match='spinalcnn_a1: its weights do not load .* a model must come from timm.create'):
        package(direct)


def test_full_disk(hub, run, capsys, full_disk):
    with full_disk(30_000):
        assert send(run) == 2
    err = capsys.readouterr().err
    assert 'cannot write' in err and err.count('\n') == 1 and hub.store.repos == {}
