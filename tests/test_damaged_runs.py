"""Damaged files of a run folder: one line that names the file, code 2, nothing written; in every verb that reads them.
"""
import json
import os
import shutil

import pytest

from timm_spinal.cli import main

from .training.images import make_split

TRAIN = ['train', '--model', 'test_resnet', '--data-dir', 'data', '--img-size', '32', '-b', '4', '-j', '0', '--epochs',
         '1', '--warmup-epochs', '0', '--lr', '0.01', '--output', '.', '--experiment']
PLOT, REPORT = ['plot', 'run'], ['compare', '--report', 'run', 'other']
PUBLISH = ['publish', 'run', '--repo', 'me/x', '--license', 'mit', '--dry-run']
BESIDE = ['publish', 'other', '--beside', 'run', '--repo', 'me/x', '--license', 'mit', '--dry-run']
VALIDATE = ['validate', '--checkpoint', 'run', '--data-dir', 'data', '-j', '0']
PACK, GRAM, SHARE = ['pack', 'run', '-o', 'z'], ['gram', 'run'], ['active-share', 'run']
EXPORT = ['export', 'local-dir:run']
COMPARISON = dict(kind='sweep', command='', variants=['a', 'b'], control='a', seeds=[0], data={}, setting={})

NO_JSON = [b'', b'\xff\xfe', b'\x00', b'[]', b'null', b'3', b'{"a":', b'[' * 3000]
TABLES = [b'', b'\x00\x00', b'epoch,\xe9\n1,2\n', b'epoch\n', b'epoch,eval_top1\n0,abc\n', b'eval_top1\n5\n',
          b'epoch,eval_top1\n0,1,2\n', b'epoch,eval_top1\n0\n', b'epoch,eval_top1\n,1\n', b'"unclosed',
          b'\x89PNG\r\n\x1a\n\x00', b'epoch,' * 9999]
NO_YAML = [b'\xff\xfe', b'[]', b'a: b: c', b'lr: 0.1\nlr: 0.2\n', b'epochs: x', b'nosuch: 1', b'a: ' + b'[' * 3000]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    home = os.getcwd()
    os.chdir(folder)
    try:
        for split in ('train', 'validation'):
            make_split(folder / 'data' / split)
        assert main([*TRAIN, 'run']) == 0 and main([*TRAIN, 'other', '--seed', '1']) == 0
    finally:
        os.chdir(home)
    return folder


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / 'here')
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'here'


def contents(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob('*')}


def check(place, capsys, argv, name, codes=(2,)):
    """One call of the command line."""
    before = contents(place)
    code = main(argv)
    err = capsys.readouterr().err
    assert code in codes, (argv, code, err)
    if code == 2:
        errors = [line for line in err.splitlines() if line.startswith('error: ')]
        assert len(errors) == 1 and 'Traceback' not in err and name in errors[0], (argv, err)
        assert contents(place) == before, argv


@pytest.mark.parametrize('content', TABLES, ids=lambda content: repr(content[:20]))
def test_summary(place, capsys, content):
    (place / 'run/summary.csv').write_bytes(content)
    check(place, capsys, PLOT, 'run')


@pytest.mark.parametrize('content', NO_JSON, ids=lambda content: repr(content[:20]))
def test_result_that_is_no_json(place, capsys, content):
    (place / 'run/result.json').write_bytes(content)
    for argv in (PLOT, REPORT, PUBLISH, BESIDE):
        check(place, capsys, argv, 'run/result.json')


@pytest.mark.parametrize('value', ['x', [], True], ids=repr)
def test_result_with_values_of_other_types(place, capsys, value):
    path = place / 'run/result.json'
    result = json.loads(path.read_text())
    for key in ('top1', 'loss', 'seconds', 'params', 'train_size'):
        path.write_text(json.dumps(dict(result, **{key: value})))
        for argv in (PLOT, REPORT, PUBLISH, BESIDE):
            check(place, capsys, argv, 'run/result.json')


@pytest.mark.parametrize('content', NO_JSON, ids=lambda content: repr(content[:20]))
def test_config_that_is_no_json(place, capsys, content):
    (place / 'run/config.json').write_bytes(content)
    for argv in (PUBLISH, VALIDATE, PACK, GRAM, SHARE, EXPORT):
        check(place, capsys, argv, 'config.json')


@pytest.mark.parametrize('value', ['x', [], 3, None], ids=repr)
@pytest.mark.parametrize('key', ['architecture', 'pretrained_cfg', 'num_classes', 'model_args',
                                 'pretrained_cfg.input_size', 'pretrained_cfg.mean', 'pretrained_cfg.label_names'])
def test_config_with_values_of_other_types(place, capsys, key, value):
    path = place / 'run/config.json'
    config = json.loads(path.read_text())
    outer, _, inner = key.rpartition('.')
    (config[outer] if outer else config)[inner] = value
    path.write_text(json.dumps(config))
    for argv in (PUBLISH, VALIDATE, PACK):
        check(place, capsys, argv, '', (0, 2))


@pytest.mark.parametrize('content', NO_YAML, ids=lambda content: repr(content[:20]))
def test_args(place, capsys, content):
    (place / 'run/args.yaml').write_bytes(content)
    for argv in (REPORT, PUBLISH, BESIDE):
        check(place, capsys, argv, 'run/args.yaml')


@pytest.mark.parametrize('content', [
    *NO_JSON, b'{}', *(json.dumps({**COMPARISON, **changes}).encode() for changes in (
        dict(variants='ab'), dict(seeds=['a']), dict(seeds=3), dict(variants=[1]), dict(folders=['run']),
        dict(data=None), dict(setting=[]), dict(costs=[]), dict(nosuch=1)))], ids=lambda content: repr(content[-30:]))
def test_comparison(place, capsys, content):
    (place / 'comparison').mkdir()
    (place / 'comparison/compare.json').write_bytes(content)
    for argv in (['plot', 'comparison'], ['compare', '--report', 'comparison']):
        check(place, capsys, argv, 'comparison/compare.json')


@pytest.mark.parametrize('content', TABLES, ids=lambda content: repr(content[:20]))
def test_table_of_exports(place, capsys, content):
    pytest.importorskip('onnx')
    (place / 'table.csv').write_bytes(content)
    check(place, capsys, ['export', 'nosuch_model', '--table', 'table.csv'], 'table.csv')
