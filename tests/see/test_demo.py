"""The page: answers of the model, what it refuses, what it keeps; in a real browser; and as a Space."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.see import demo
from timm_spinal.see.opened import open_any
from timm_spinal.training.config import TrainConfig, to_yaml

from ..conftest import launch_env
from ..training.images import make_folder
from .folders import make_detector, make_pictures, make_run, write_bomb
from .test_predict import NAMES, expected

gradio = pytest.importorskip('gradio')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('demo') / 'run')


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / 'p', 3, 60)


def test_answers(run, pictures, tmp_path):
    pytest.importorskip('pytorch_grad_cam')
    best, heat = demo.answer(open_any(str(run)), str(pictures[0]))
    want = expected(run, pictures[:1])[0]
    assert list(best) == [NAMES[i] for i in want.argsort(descending=True)]
    assert list(best.values()) == pytest.approx(want.sort(descending=True).values.tolist(), rel=1e-4)
    assert heat.size == (320, 320) and np.asarray(heat).std() > 10
    opened = open_any(str(make_detector(tmp_path / 'detector')))
    best, boxes = demo.answer(opened, str(pictures[0]))
    assert best == {} and max(boxes.size) >= 60  # random weights are sure of nothing


def test_uploads_are_bounded(run, tmp_path, pictures, monkeypatch):
    opened = open_any(str(run))
    with pytest.raises(UserError, match='too many pixels'):
        demo.answer(opened, str(write_bomb(tmp_path / 'bomb.png')))
    with pytest.raises(UserError, match='8000 x 7000 pixels, more than 50 million'):
        demo.answer(opened, str(write_bomb(tmp_path / 'large.png', 8000, 7000)))
    (tmp_path / 'text.png').write_text('words')
    with pytest.raises(UserError, match='cannot be read'):
        demo.answer(opened, str(tmp_path / 'text.png'))
    monkeypatch.setattr(demo, 'MOST_BYTES', 1000)
    with pytest.raises(UserError, match='more than 0 MB'):
        demo.answer(opened, str(pictures[0]))


def test_examples_come_from_the_validation_split(tmp_path):
    make_folder(tmp_path / 'images', classes=('ant', 'bee', 'cat'), per_class=5)
    (tmp_path / 'args.yaml').write_text(to_yaml(TrainConfig(data_dir=str(tmp_path / 'images'))))
    (tmp_path / 'e').mkdir()
    paths = demo.examples_of(tmp_path, tmp_path / 'e', 3)
    assert len(paths) == 3
    for path, name in zip(paths, ('ant/0', 'bee/2', 'cat/4')):
        original = tmp_path / 'images' / 'validation' / f'{name}.png'
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(original)))
    shutil.rmtree(tmp_path / 'images')
    assert demo.examples_of(tmp_path, tmp_path / 'e') == []


@pytest.mark.parametrize('arguments, message', [
    (['RUN', '--port', 'TAKEN'], 'cannot be listened on (Address already in use); choose another --port'),
    (['RUN', '--port', '0'], '--port: must be at least 1'),
    (['RUN', '--host', 'no.such.host.invalid'], 'cannot be listened on'),
    (['RUN', '--repo', 'me/x'], '--repo: is for --space'),
    (['RUN', '--space', 'there'], '--space there: exists already'),
    (['RUN', '--space', 'new', '--repo', 'a b'], 'is not a repository name'),
    (['none/run', '--space', 'new'], 'model none/run: no such folder'),
    (['RUN', '--examples', 'none.png'], 'image none.png: there is no such file'),
])
def test_bad_input(run, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'there').mkdir()
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        places = dict(RUN=str(run), TAKEN=str(taken.getsockname()[1]))
        assert main(['demo', *(places.get(a, a) for a in arguments)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count('\n') == 1 and [p.name for p in tmp_path.iterdir()] == ['there']


def test_space_of_a_published_model(run, tmp_path, pictures):
    assert main(['demo', str(run), '--space', str(tmp_path / 'space'), '--repo', 'me/x', '--examples',
                 str(pictures[0])]) == 0
    app = (tmp_path / 'space' / 'app.py').read_text()
    assert "build(['hf-hub:me/x']" in app and not (tmp_path / 'space' / 'model').exists()
    head = yaml.safe_load((tmp_path / 'space' / 'README.md').read_text().split('---')[1])
    assert head['sdk'] == 'gradio' and head['app_file'] == 'app.py' and head['models'] == ['me/x']
    assert head['sdk_version'] == gradio.__version__
    needed = (tmp_path / 'space' / 'requirements.txt').read_text().splitlines()
    assert any(line.startswith('timm') for line in needed) and 'grad-cam' in needed
    assert not any('extra' in line for line in needed)
    assert [p.name for p in (tmp_path / 'space' / 'examples').iterdir()] == ['00.png']


def start(command, **kwargs):
    """A page in a process of its own; returns the process and its address."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)
    line = process.stdout.readline()
    assert line.startswith('open http://'), line
    return process, line.split()[1]


@pytest.mark.slow
def test_space_answers(run, tmp_path, pictures):
    """app.py as a Space runs it: in its folder, with the package that lies there."""
    client = pytest.importorskip('gradio_client')
    assert main(['demo', str(run), '--space', str(tmp_path / 'space')]) == 0
    env = {k: v for k, v in launch_env().items() if k != 'PYTHONPATH'}
    process, address = start([sys.executable, 'app.py'], cwd=tmp_path / 'space', env=env)
    try:
        label, heat = client.Client(address, verbose=False).predict(
            client.handle_file(str(pictures[0])), api_name='/predict')
        assert label['label'] == NAMES[int(expected(run, pictures[:1]).argmax())] and heat
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_command_ends_and_leaves_nothing(run, tmp_path, pictures):
    client = pytest.importorskip('gradio_client')
    env = dict(launch_env(), TMPDIR=str(tmp_path / 'temp'))
    (tmp_path / 'temp').mkdir()
    command = [sys.executable, '-m', 'timm_spinal.cli', 'demo', str(run), '--beside', 'spinalcnn_a1.mnist']
    process, address = start(command, env=env)
    try:
        assert address.startswith('http://127.0.0.1:')
        here = client.Client(address, verbose=False, download_files=str(tmp_path))
        answers = here.predict(client.handle_file(str(pictures[0])), api_name='/predict')
        assert len(answers) == 4 and answers[2]['label'][0].isdigit()
        assert list((tmp_path / 'temp').rglob('*.png'))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert not list((tmp_path / 'temp').glob('timm_spinal_demo_*'))


# ---- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    places = shutil.which('chromium'), shutil.which('chromedriver')
    if not all(places):
        pytest.skip("no chromium with chromedriver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for argument in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu', 'window-size=1200,900'):
        options.add_argument(f'--{argument}')
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    driver = webdriver.Chrome(service=webdriver.ChromeService(places[1]), options=options)
    yield driver
    driver.quit()


def until(found, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.3)
    raise AssertionError('nothing came')


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_a_browser(run, tmp_path, pictures, browser, monkeypatch):
    """Upload a picture, read the answer, see the heat map, try an example; no other host is asked for anything."""
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
    (tmp_path / 'text.png').write_text('words')
    page = demo.page_of([open_any(str(run))], [str(pictures[1])], '<b>My page</b>')
    try:
        browser.get(demo.serve(page, demo.LOOPBACK, block=False))
        find = browser.find_elements
        upload = until(lambda: find('css selector', '#picture input[type=file]'))[0]
        upload.send_keys(str(pictures[0]))
        text = until(lambda: '%' in (t := browser.find_element('id', 'answer-0').text) and t)
        want = expected(run, pictures[:2])
        name, p = NAMES[int(want[0].argmax())], float(want[0].max())
        assert name in text and f'{100 * p:.0f}%' in text
        until(lambda: find('css selector', '#heat-0 img'))
        browser.save_screenshot(str(tmp_path / 'page.png'))
        assert np.asarray(Image.open(tmp_path / 'page.png').convert('L')).std() > 10
        assert find('tag name', 'h1')[0].text == '<b>My page</b>'

        find('css selector', '.gallery-item')[0].click()  # the example
        second = f'{100 * float(want[1].max()):.0f}%'
        until(lambda: second in browser.find_element('id', 'answer-0').text)

        browser.get(browser.current_url)
        upload = until(lambda: find('css selector', '#picture input[type=file]'))[0]
        upload.send_keys(str(tmp_path / 'text.png'))
        until(lambda: 'cannot be read' in browser.find_element('tag name', 'body').text)

        asked = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
        urls = [m['params']['request']['url'] for m in asked if m['method'] == 'Network.requestWillBeSent']
        hosts = {url.split('/')[2].split(':')[0] for url in urls if url.startswith('http')}
        assert hosts == {demo.LOOPBACK}
        assert {Path(p).suffix for p in map(os.fspath, (tmp_path / 'uploads').rglob('*.*'))} >= {'.png'}
    finally:
        page.close(verbose=False)
