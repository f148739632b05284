"""A Space that shows a published model, made in one go with it."""
import yaml

from timm_spinal.cli import main

from .conftest import REPO
from .test_publish import files


def test_model_and_space_in_one_go(hub, run, capsys):
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--space', 'me/digits-demo']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f'published {hub.url}/spaces/me/digits-demo'
    space = hub.store.repos['me/digits-demo']
    sent = {name: blob.data.decode(errors='replace') for name, blob in space.files().items()}
    assert space.kind == 'space' and not space.private and f"build(['hf-hub:{REPO}']" in sent['app.py']
    head = yaml.safe_load(sent['README.md'].split('---')[1])
    assert head['sdk'] == 'gradio' and head['models'] == [REPO]
    assert 'requirements.txt' in sent and not any(name.endswith('.safetensors') for name in sent)
    assert 'timm_spinal/see/demo.py' in sent  # as long as no index has the package
    commits = len(space.commits)
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--space', 'me/digits-demo']) == 0
    assert len(hub.store.repos[REPO].commits) == 2 and len(space.commits) <= commits + 1


def test_card_shows_what_the_model_gets_wrong(hub, run):
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit']) == 0
    card = files(hub)['README.md'].decode()
    assert '](confusion.png)' in card and '](worst.png)' in card
    assert files(hub)['worst.png'] == (run / 'worst.png').read_bytes()
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--no-pictures']) == 0
    assert 'worst.png' not in files(hub) and '.png)' not in files(hub)['README.md'].decode().replace('image.png', '')


def test_space_without_a_repository(run, capsys):
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--dry-run', '--space', 'me/x']) == 2
    assert '--space me/x: needs a model on the Hub' in capsys.readouterr().err
    assert main(['publish', str(run), '--repo', REPO, '--license', 'mit', '--space', 'me/a b']) == 2
    assert '--space' in capsys.readouterr().err
