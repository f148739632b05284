"""Answers to pictures: those of timm's own model and transform, in order, in every form; and bad input."""
import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import timm_spinal
from timm_spinal.cli import main
from timm_spinal.detection import load_detector
from timm_spinal.see.opened import class_names
from timm_spinal.see.predict import MOST_SHOWN
from timm_spinal.training.pixels import Decoder

from ..conftest import launch_env
from .folders import make_detector, make_pictures, make_run, write_bomb

NAMES = ('ant', 'bee', '=cat()')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('see') / 'run')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp('pictures'))


def expected(run, paths, mode='RGB'):
    """Probabilities (N, classes) by timm alone, image by image."""
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        return torch.cat([model(transform(Image.open(p).convert(mode))[None]).softmax(1) for p in paths])


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def predict(*arguments, code=0):
    assert main(['predict', *map(str, arguments), '-j', '0']) == code


def test_answers_are_those_of_timm(run, pictures, capsys, monkeypatch):
    order = [pictures[i] for i in (3, 0, 4, 1, 2, 0)]
    predict(run, *order, '--json', '--batch-size', 4)
    found, want = lines(capsys), expected(run, order)
    assert [row['path'] for row in found] == list(map(str, order))
    for row, p in zip(found, want):
        top = p.argsort(descending=True)
        assert [c['class'] for c in row['predictions']] == [NAMES[i] for i in top]
        assert [c['score'] for c in row['predictions']] == pytest.approx(p[top].tolist(), rel=1e-4, abs=1e-6)
    assert len({row['predictions'][0]['class'] for row in found}) > 1  # the model tells them apart

    def top(*arguments):
        predict(*arguments, '--json', '--topk', 1)
        return [(row['path'], row['predictions'][0]['class']) for row in lines(capsys)]

    answers = [(str(p), NAMES[i]) for p, i in zip(pictures, expected(run, pictures).argmax(1))]
    assert top(f'local-dir:{run}', pictures[0].parent) == answers
    assert top(run, str(pictures[0].parent / '[1-3].png')) == answers[1:4]
    assert top(run, str(pictures[0].parents[1] / 'pictures0' / '**' / '2.png')) == answers[2:3]
    listed = io.TextIOWrapper(io.BytesIO(b'\r\n'.join(os.fsencode(p) for p in pictures) + b'\n\n'))
    monkeypatch.setattr(sys, 'stdin', listed)
    assert top(run, '-') == answers
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\0'.join(os.fsencode(p) for p in pictures[:2]))))
    assert top(run, '-', pictures[4]) == [*answers[:2], answers[4]]


def test_table_csv_and_montage(run, pictures, tmp_path, capsys):
    folder = tmp_path / 'deep' / 'deeper'
    make_pictures(folder, 12, 32)
    (tmp_path / 'deep' / 'notes.txt').write_text('x')
    (folder / '=1+1.png').write_bytes(pictures[0].read_bytes())
    os.chdir(folder.parents[1])
    predict(run, 'deep', folder / '=1+1.png', '=1+1.png', '--csv', 'out.csv', '--montage', 'out.png', code=2)
    assert 'error: image =1+1.png: there is no such file or folder' in capsys.readouterr().err
    os.chdir(folder)
    predict(run, '..', '=1+1.png', '--csv', tmp_path / 'out.csv', '--montage', tmp_path / 'out.png', '--topk', 2)
    said = capsys.readouterr()
    table = said.out.splitlines()
    order = [f'{os.path.join("..", "deeper", f"{name}.png")}' for name in ('=1+1', *range(12))]
    assert [row.split()[0] for row in table] == [*sorted(order[:1]), *order[1:], '=1+1.png'] or len(table) == 14
    assert said.err == 'skipped 1 of other types (notes.txt)\n'.replace('notes.txt', '.txt')
    assert all(row.count(' %') == 2 for row in table)
    rows = list(csv.reader((tmp_path / 'out.csv').open()))
    assert rows[0] == ['path', 'class_1', 'score_1', 'class_2', 'score_2', 'error'] and len(rows) == 15
    assert rows[-1][0] == "'=1+1.png" and {row[1] for row in rows[1:]} <= {'ant', 'bee', "'=cat()"}
    assert any(row[1] == "'=cat()" or row[3] == "'=cat()" for row in rows[1:])
    assert float(rows[-1][2]) == pytest.approx(expected(run, pictures[:1]).max().item(), rel=1e-5)
    with Image.open(tmp_path / 'out.png') as sheet:
        assert sheet.width > 800 and np.asarray(sheet.convert('L')).std() > 20
    assert not list(tmp_path.glob('.*'))


def test_montage_has_the_first_pictures(run, tmp_path):
    make_pictures(tmp_path / 'many', MOST_SHOWN + 3, 16)
    make_pictures(tmp_path / 'few', 2, 16)
    for name in ('many', 'few'):
        predict(run, tmp_path / name, '--montage', tmp_path / f'{name}.png', '--img-size', 64)
    few, many = (Image.open(tmp_path / f'{name}.png').size for name in ('few', 'many'))
    assert many[0] > 2.5 * few[0] and many[1] > 4 * few[1] and many[1] < 7 * few[1]


def test_unreadable_images_are_named_and_the_rest_is_answered(run, pictures, tmp_path, capsys):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(pictures[0].read_bytes()[:100])
    predict(run, bad, pictures[0], write_bomb(tmp_path / 'bomb.png'), pictures[1], '--json', '--csv',
            tmp_path / 'o.csv', code=1)
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert ['error' in row for row in found] == [True, False, True, False]
    assert f'warning: {bad} cannot be read' in said.err and '2 of 4 images could not be read' in said.err
    assert 'decompression bomb' in found[2]['error']
    rows = list(csv.DictReader((tmp_path / 'o.csv').open()))
    assert [bool(row['error']) for row in rows] == [True, False, True, False] and not rows[0]['class_1']


def test_list_with_a_missing_file(run, pictures, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'gone.png\n' + os.fsencode(pictures[0]))))
    predict(run, '-', code=1)
    said = capsys.readouterr()
    assert said.out.startswith(str(pictures[0])) and 'gone.png cannot be read (there is no such file)' in said.err


@pytest.mark.parametrize('arguments, message', [
    (['RUN', 'none.png'], 'image none.png: there is no such file or folder'),
    (['RUN', '*.gif'], 'there is no such file or folder'),
    (['RUN', 'empty'], 'empty: holds no image; skipped: 1 of other types'),
    (['RUN', 'text.txt'], 'image text.txt: cannot be read'),
    (['RUN', 'text.txt', 'bomb.png', '--csv', 'new.csv', '--json'], 'nor can the 1 others'),
    (['RUN', 'bomb.png'], 'bomb.png: cannot be read (Image size (10000000000 pixels) exceeds limit'),
    (['RUN', 'pipe'], 'image pipe: is neither a file nor a folder'),
    (['RUN', 'a.png', '--montage', 'a.png'], '--montage a.png: is one of the images'),
    (['RUN', 'a.png', '--montage', 'a.jpg'], '--montage a.jpg: unknown format'),
    (['RUN', 'a.png', '--csv', 'no/new.csv'], 'there is no folder no'),
    (['RUN', 'a.png', '--topk', '0'], '--topk: must be at least 1'),
    (['RUN', 'a.png', '--threshold', '0.5'], 'is no detector'),
    (['RUN', 'a.png', '--device', 'gpu7'], '--device gpu7: cannot be used'),
    (['nowhere/run', 'a.png'], 'model nowhere/run: no such folder'),
    (['empty', 'a.png'], 'model empty: has no config.json'),
    (['text.txt', 'a.png'], 'is a file and no .onnx file'),
    (['resnet5O', 'a.png'], "unknown model 'resnet5O'"),
    (['vgg5', 'a.png'], 'model vgg5: '),
    (['text.onnx', 'a.png'], 'model text.onnx: is no ONNX file'),
    (['none.onnx', 'a.png'], 'model none.onnx: there is no such file'),
    (['headless', 'a.png'], 'has no classifier (num_classes is 0)'),
])
def test_bad_input_is_one_line(run, pictures, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.png').write_bytes(pictures[0].read_bytes())
    (tmp_path / 'empty').mkdir()
    for name in ('empty/notes.txt', 'text.txt', 'text.onnx'):
        (tmp_path / name).write_text('words')
    write_bomb(tmp_path / 'bomb.png')
    os.mkfifo(tmp_path / 'pipe')
    if 'headless' in arguments:
        model = timm.create_model('test_resnet', num_classes=0)
        timm_spinal.training.results.export_model(
            make_run(tmp_path / 'headless'), model, model.state_dict(), None, resolve_model_data_config(model))
    before = sorted(tmp_path.rglob('*'))
    assert main(['predict', *(str(run) if a == 'RUN' else a for a in arguments), '-j', '0']) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith('error: ') and said.err.count('\n') == 1 and said.out == ''
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'a.png').read_bytes() == pictures[0].read_bytes()


def test_pipe_among_the_files_of_a_list_does_not_hang(run, pictures, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / 'pipe.png')
    listed = os.fsencode(tmp_path / 'pipe.png') + b'\n' + os.fsencode(pictures[0])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(listed)))
    predict(run, '-', code=1)
    assert 'pipe.png cannot be read' in capsys.readouterr().err


def test_pixels_are_read_as_in_training(tmp_path, capsys):
    """Options of a run that config.json does not have."""
    run = make_run(tmp_path / 'run')
    exif = Image.Exif()
    exif[274] = 6
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    noise[:, :30] //= 4
    turned = tmp_path / 'turned.png'
    Image.fromarray(noise).save(turned, exif=exif)

    def scores():
        predict(run, turned, '--json')
        return {row['class']: row['score'] for row in lines(capsys)[0]['predictions']}

    stored = scores()
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(exif_transpose=True, input_img_mode='HSV')))
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    image = Decoder('HSV', exif_transpose=True)(Image.open(turned), lambda: '')
    assert image.size == (40, 80)
    with torch.inference_mode():
        want = model(create_transform(**resolve_model_data_config(model))(image)[None]).softmax(1)[0]
    assert scores() == pytest.approx(dict(zip(NAMES, want.tolist())), rel=1e-4)
    assert scores() != pytest.approx(stored, rel=1e-2)


def test_names_of_classes(tmp_path, pictures, capsys):
    predict(make_run(tmp_path / 'numbers', names=None), pictures[0], '--json')
    assert {row['class'] for row in lines(capsys)[0]['predictions']} == {'0', '1', '2'}
    imagenet = timm.create_model('resnet18.a1_in1k')
    names = class_names(imagenet, 'resnet18.a1_in1k')
    assert len(names) == 1000 and names[0] == ImageNetInfo().index_to_description(0) and 'tench' in names[0]
    assert class_names(imagenet, str(tmp_path)) == list(map(str, range(1000)))  # 1000 classes of somebody else
    imagenet.pretrained_cfg = dict(imagenet.pretrained_cfg, label_names={'1': 'one'})
    assert class_names(imagenet, 'resnet18')[:3] == ['0', 'one', '2']
    predict('spinalcnn_a1.mnist', pictures[1], '--json', '--topk', 10)
    assert sorted(row['class'] for row in lines(capsys)[0]['predictions'])[0].startswith('0')


@pytest.mark.slow
def test_onnx_answers_as_the_model(run, pictures, tmp_path, capsys):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    assert main(['export', f'local-dir:{run}', '--format', 'onnx', '--output', str(tmp_path / 'x')]) == 0
    file, = (tmp_path / 'x').rglob('*.onnx')
    capsys.readouterr()
    predict(run, *pictures, '--json')
    want = lines(capsys)
    predict(file, *pictures, '--json')
    for a, b in zip(want, lines(capsys)):
        assert [r['class'] for r in a['predictions']] == [r['class'] for r in b['predictions']]
        assert [r['score'] for r in a['predictions']] == pytest.approx(
            [r['score'] for r in b['predictions']], rel=1e-3, abs=1e-5)
    other = onnx.load(file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / 'other.onnx')
    predict(tmp_path / 'other.onnx', pictures[0], code=2)
    assert 'does not say what its images need' in capsys.readouterr().err


def test_packed_model(tmp_path, pictures, capsys):
    run = make_run(tmp_path / 'run', 'test_resnet_xnodr')
    assert main(['pack', str(run), '--output', str(tmp_path / 'packed')]) == 0
    capsys.readouterr()
    answers = []
    for folder in (run, tmp_path / 'packed'):
        predict(folder, *pictures, '--json')
        answers.append([[(r['class'], round(r['score'], 3)) for r in row['predictions']] for row in lines(capsys)])
    assert answers[0] == answers[1]


def test_detector_draws_its_boxes(tmp_path, pictures, capsys):
    run = make_detector(tmp_path / 'detector')
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'x')
    # boxes of random weights have low scores, many of them the same; so no batch whose rounding would choose others
    predict(run, *pictures[:2], bad, '--json', '--threshold', '1e-6', '--montage', tmp_path / 'boxes.png', '-b', 1,
            code=1)
    found = lines(capsys)
    detector = load_detector(run)
    for path, row in zip(pictures, found[:2]):
        image = torch.from_numpy(np.asarray(Image.open(path).convert('RGB')).copy()).permute(2, 0, 1) / 255
        with torch.inference_mode():
            want = detector([image])[0]
        assert [r['score'] for r in row['predictions']] == pytest.approx(want['scores'].tolist(), rel=1e-4)
        assert np.allclose([r['box'] for r in row['predictions']], want['boxes'].numpy(), atol=1e-2)
        assert [r['class'] for r in row['predictions']] == [('-1', 'disc', 'square')[i] for i in want['labels']]
        assert row['predictions']
    assert 'error' in found[2]
    predict(run, pictures[0], '--csv', tmp_path / 'o.csv', '--threshold', '1e-6', '-b', 1)
    rows = list(csv.DictReader((tmp_path / 'o.csv').open()))
    assert len(rows) == len(found[0]['predictions']) and float(rows[0]['x2']) == found[0]['predictions'][0]['box'][2]
    predict(run, pictures[0])
    assert 'nothing found' in capsys.readouterr().out
    predict(run, pictures[0], '--topk', '2', code=2)


@pytest.mark.slow
def test_two_processes_write_what_one_does(run, pictures, tmp_path, launch):
    make_detector(tmp_path / 'detector')
    (tmp_path / 'bad.png').write_bytes(b'x')
    paths = [*map(str, pictures), str(tmp_path / 'bad.png'), *map(str, pictures[:3])]
    for model, more in ((run, []), (tmp_path / 'detector', ['--threshold', '1e-6'])):
        said = []
        for processes in (1, 2):
            done = launch(processes, '-m', 'timm_spinal.see.predict', str(model), *paths, '-j', '0', '-b', '2', '--csv',
                          str(tmp_path / f'{processes}.csv'), *more, check=False)
            said.append(done.stdout)
            assert 'cannot be read' in done.stderr and done.stderr.count('bad.png cannot be read') == 1
        one, two = (list(csv.reader((tmp_path / f'{n}.csv').open())) for n in (1, 2))
        assert len(one) >= 10 and [row[:2] for row in one] == [row[:2] for row in two] and said[0] == said[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(run, tmp_path):
    first, = make_pictures(tmp_path / 'p', 1, 32)
    for i in range(1, 4000):
        os.link(first, tmp_path / 'p' / f'x{i}.png')
    code = ('import resource, sys; from timm_spinal.cli import main; code = main(sys.argv[1:]); '
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)')
    peaks = []
    for count in (400, 4000):
        paths = '\n'.join(str(p) for p in sorted((tmp_path / 'p').iterdir())[:count])
        done = subprocess.run(
            [sys.executable, '-c', code, 'predict', str(run), '-', '--csv', str(tmp_path / 'o.csv'), '--montage',
             str(tmp_path / 'o.png'), '-j', '0', '-b', '64'],
            input=paths, capture_output=True, text=True, env=launch_env(), timeout=250)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == count
        peaks.append(int(done.stderr.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 90, peaks  # MB; the tensors of the images alone are 175 MB
