import os
import re
import subprocess
import sys

import pytest
import timm

import timm_spinal
from timm_spinal.bench.cli import COMPARISONS
from timm_spinal.cli import VERBS, guard, main
from timm_spinal.errors import StopRequested, UserError


def test_every_verb_has_a_function():
    import importlib
    for name, verb in VERBS.items():
        assert callable(getattr(importlib.import_module(verb.module), verb.function)), name


def test_help_names_every_verb(capsys):
    assert main([]) == main(['--help']) == 0
    out = capsys.readouterr().out
    assert all(f'  {name} ' in out and verb.help in out for name, verb in VERBS.items())


def test_list_marks_what_needs_no_network(capsys):
    assert main(['list', '--pretrained']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == timm_spinal.list_models(pretrained=True)
    for line in lines:
        name, _, mark = line.partition('  ')
        assert bool(timm.get_pretrained_cfg(name).file) == (mark == '(in the package, needs no network)')
    assert 'spinalcnn_a1.mnist  (in the package, needs no network)' in lines


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'timm-spinal {timm_spinal.__version__}\n'


def test_bare_bench_lists_the_benchmarks(capsys):
    assert main(['bench']) == 0
    out = capsys.readouterr().out
    listed = out.split('prepared comparisons:\n')[1].split('\n\n')[0]
    assert [line.split()[0] for line in listed.splitlines()] == list(COMPARISONS)


@pytest.mark.parametrize('verb', VERBS)
def test_help_of_a_verb_has_a_sentence_an_example_and_options(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), '--help'])
    out = capsys.readouterr().out
    usage, sentence, rest = re.split(r'\n\n', out, maxsplit=2)
    assert stop.value.code == 0 and usage.startswith(f'usage: timm-spinal {verb}')
    assert re.match(r'[A-Z].*[.:]', sentence, re.DOTALL)
    assert re.search(rf'^ *(timm-spinal {verb}|accelerate launch -m timm_spinal)', rest, re.MULTILINE)
    assert '--debug' in out


def test_list(capsys):
    assert main(['list', 'resnet18_*']) == 0
    assert capsys.readouterr().out.split() == timm_spinal.list_models('resnet18_*')
    assert main(['list', '--pretrained', 'resnet18_pspinal*']) == 0
    assert 'resnet18_pspinal.backbone_a1_in1k' in capsys.readouterr().out.split()


@pytest.mark.parametrize('argv, text', [
    (['lsit'], "error: unknown command 'lsit'; did you mean list?"),
    (['x'], "error: unknown command 'x'; known are train, "),
    (['bench', 'haeds'], 'error: haeds: neither a comparison nor a model has this name; did you mean heads?'),
    (['list', 'nothing*'], "error: no model of this package matches 'nothing*'"),
    (['train', '--modle', 'x'], 'error: unknown flag --modle; did you mean --model: name of the model'),
    (['train', 'x'], "error: unexpected argument 'x'"),
    (['train', '--config', '/nowhere.yaml'], 'error: config /nowhere.yaml: '),
    (['train', '--model', 'nonsense', '--dataset', 'digits'], "error: unknown model 'nonsense'"),
    (['train', '--data-dir', '/nowhere', '--model', 'resnet18'], 'error: '),
    (['validate', '--model', 'nonsense_*'], "error: model 'nonsense_*': no model matches"),
])
def test_errors_are_one_line_with_code_2(argv, text, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(text) and err.count('\n') == 1


def test_debug_shows_the_traceback():
    with pytest.raises(UserError):
        main(['train', '--data-dir', '/nowhere', '--model', 'resnet18', '--debug'])


@pytest.mark.parametrize('signum, code', [(2, 130), (15, 143)])
def test_signals(signum, code, capsys):
    def stopped(argv):
        raise StopRequested(signum)
    assert guard(stopped, []) == code
    assert '--resume' in capsys.readouterr().err


def test_other_processes_keep_silent(monkeypatch, capsys):
    def fail(argv, local=False):
        error = UserError('bad')
        if local:
            error.local = True
        raise error
    monkeypatch.setenv('RANK', '1')
    assert guard(fail, []) == 2 and capsys.readouterr().err == ''
    assert guard(lambda argv: fail(argv, local=True), []) == 2 and capsys.readouterr().err == 'error: bad\n'


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guard(lambda argv: 1 // 0, [])


@pytest.mark.slow
def test_closed_pipe():
    command = f'{sys.executable} -m timm_spinal.cli list | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True, env=dict(os.environ))
    assert 'Traceback' not in done.stderr
