"""Any call of any verb ends with code 0, or with one line and code 2 and nothing written; never with a traceback."""
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Sequence

import pytest

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from timm_spinal.active_share import ActiveShareConfig  # noqa: E402
from timm_spinal.cli import VERBS, main  # noqa: E402
from timm_spinal.compare.gradflow import GradflowConfig  # noqa: E402
from timm_spinal.compare.options import FrozenConfig  # noqa: E402
from timm_spinal.detection.options import DetectionConfig  # noqa: E402
from timm_spinal.hub.options import TrainAndPushConfig  # noqa: E402
from timm_spinal.training.config import ValidateConfig  # noqa: E402

from .training.images import make_split  # noqa: E402

CALLS = 400
TRAIN = ('--model', 'test_resnet', '--data-dir', 'data', '--img-size', '32', '-b', '4', '-j', '0', '--epochs', '1',
         '--warmup-epochs', '0', '--lr', '0.01', '--output', 'out', '--experiment', 'new')
# right calls that take a second or two at most, or calls that end with an error of the verb itself; to those of the
# other verbs a flag is added that does not exist
BASES = {
    'train': [TRAIN, ('--dataset', 'digits', '--model', 'spinal_mlp', '--config', 'run.yaml', '--output', 'out')],
    'validate': [('--model', 'local-dir:run', '--data-dir', 'data', '-j', '0'),
                 ('--checkpoint', 'run', '--data-dir', 'data', '-j', '0', '--results-file', 'r.csv')],
    'list': [(), ('*pspinal',)],
    'env': [()],
    'plot': [('run',)],
    'publish': [('run', '--repo', 'me/x', '--license', 'mit', '--dry-run')],
    'compare --report': [('run', 'run2')],
    'compare': [('--backbone', 'test_resnet', '--data-dir', 'data', '--img-size', '32', '-j', '0', '--heads', 'linear',
                 '--seeds', '1', '--epochs', '1', '--head-batch-size', '4')],
    'compare --sweep': [('run.yaml',), ('twice.yaml',), ('no.yaml',)],
    'gradflow': [('--data-dir', 'data', *TRAIN)],
    'train-detection': [('--data-dir', 'data', '-j', '0', '--backbone', 'test_resnet')],
    'pack': [('run', '-o', 'packed')],
    'active-share': [('run',)],
    'gram': [('run',)],
    'verify': [('run',)],
    'export': [('nosuch_model',)],
    'bench': [('nosuch_model',), ('routing', 'resnet18'), ('ic', 'nosuch_model')],
    'coverage': [('nosuch_model',)],
}
VALUES = ('-1', '0', '1', '2', '0.5', '1e999', 'nan', '4294967296', '9' * 5000, 'x', '', ' ', 'no/such', '.', 'data',
          'run', 'zero.pth', 'deep.yaml', 'twice.yaml', 'latin.csv', 'a=1', 'a=b=c', 'true', 'None', '*', '[', '../x',
          'ü', 'a\nb')
# of options whose values are names or texts with a form of their own, by flag: right ones and nearly right ones
NAMES = ('test_resnet', 'test_vit', 'spinalcnn_a1', 'test_resnet_pspinal', 'resnet20_cifar', 'test_resnet_xnodr',
         'ictest_resnet', 'x', 'a/b', 'hf-hub:a/b', 'local-dir:run', 'local-dir:x', 'test_*')
POOLS = {
    '--model': NAMES, '-m': NAMES, '--backbone': NAMES, '--kd-model-name': (*NAMES, 'run'),
    '--model-kwargs': ('head_width=2', 'x=1', 'a', '=', 'in_chans=1', 'block=3', 'drop_rate=x', 'head_layers=0'),
    '--opt-kwargs': ('foreach=true', 'lr=1', 'x=1', 'nesterov=3', '='),
    '--opt': ('sgd', 'adamw', 'lamb', 'lookahead_sgd', 'adafactor', 'lbfgs', 'muon', 'x', ''),
    '--aa': ('rand-m9-mstd0.5', 'augmix-m3', 'original', '3a', 'v0', 'rand-m99', 'rand', 'x-1', ''),
    '--dataset': ('digits', 'torch/digits', 'torch/cifar10', 'hfds/x', 'wds/x', 'multimnist', 'folder', 'x/', ''),
    '--heads': ('linear,mlp', 'spinal:width=2', 'spinal:width=0', 'mlp=spinal', 'linear,linear', 'x', ','),
    '--seeds': ('1', '0', '3,3', '1,2', 'x', '-1'), '--control': ('linear', 'mlp', 'x'),
    '--gp': ('avg', 'max', 'avgmax', 'fast', 'x'), '--interpolation': ('bicubic', 'nearest', 'random', 'x'),
    '--train-interpolation': ('bicubic', 'random', 'x'), '--input-img-mode': ('L', 'RGB', 'CMYK', '1', 'I;16', 'x'),
    '--freeze-modules': ('conv1', 'layer1', 'fc', 'x'), '--class-map': ('run.yaml', 'no.txt', 'latin.csv'),
    '--lr-decay-fn': ('linear', 'cosine', '1-sqrt', 'x'), '--weights': ('best', 'raw', 'ema', 'x'),
    '--results-file': ('r.csv', 'r.json', 'r.txt', 'no/r.csv', 'data'), '--output': ('new', 'run', 'p.png', 'no/p.png'),
    '--checkpoint': ('run', 'run/last', 'run/model.safetensors', 'zero.pth', 'no*'), '--resume': ('auto', 'run', 'no'),
}
# what would take minutes, the network or another process
LEFT_OUT = {'--torchcompile', '--help', '--debug', '--workers', '--log-with', '--jobs', '--epochs', '--epoch-repeats',
            '--min-updates', '-j'}
CONFIGS = {'train': TrainAndPushConfig, 'validate': ValidateConfig, 'compare': FrozenConfig, 'gradflow': GradflowConfig,
           'train-detection': DetectionConfig, 'active-share': ActiveShareConfig}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with images, two runs, and files that are none."""
    folder = tmp_path_factory.mktemp('calls')
    home = os.getcwd()
    os.chdir(folder)
    try:
        for split in ('train', 'validation'):
            make_split(folder / 'data' / split)
        for name in ('run', 'run2'):
            assert main(['train', *TRAIN[:-3], '.', '--experiment', name]) == 0
    finally:
        os.chdir(home)
    (folder / 'zero.pth').write_bytes(b'')
    (folder / 'latin.csv').write_bytes(b'epoch,\xe9\n1,2\n')
    (folder / 'deep.yaml').write_text('a: ' + '[' * 3000)
    (folder / 'twice.yaml').write_text('lr: 0.1\nlr: 0.2\n')
    (folder / 'run.yaml').write_text('epochs: 1\nbatch_size: 64\nworkers: 0\n')
    return folder


def flags_of(verb: str, capsys) -> list[str]:
    with pytest.raises(SystemExit):
        main([*verb.split(), '--help'])
    return sorted(set(re.findall(r'(?<![\w-])--?[a-z][\w-]*', capsys.readouterr().out.partition('\n\n')[0])) - LEFT_OUT)


def values_of(verb: str, flag: str) -> st.SearchStrategy:
    """Values that are mostly of the flag's type, so that they come past the parser."""
    known = {f.name: f for f in dataclasses.fields(CONFIGS[verb])} if verb in CONFIGS else {}
    field = known.get(flag.lstrip('-').replace('-', '_').removeprefix('no_'))
    if flag in POOLS:
        return some(POOLS[flag], 1, 2 if field is None else 3 if 'list' in str(field.type) else 1)
    if field is None:
        return st.lists(st.sampled_from(VALUES), max_size=2)
    kind, choices = str(field.type), [str(c) for c in field.metadata['choices']]
    if 'bool' in kind:
        return st.just([])
    numbers = ['0', '1', '2', '3', '7'] if 'int' in kind else ['0', '0.1', '0.5', '1', '2', '1e-30', '1e5']
    right = choices or (numbers if 'int' in kind or 'float' in kind else VALUES)
    size = field.metadata['nargs'] or 0
    return some(right, size or 1, size or (3 if 'list' in kind else 1))


def some(right: Sequence[str], least: int = 1, most: int = 1) -> st.SearchStrategy:
    """Values of which most are of the right kind."""
    return st.lists(st.sampled_from([*list(right) * (1 + 40 // len(right)), *VALUES]), min_size=least, max_size=most)


def contents(folder: Path) -> dict[str, tuple]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob('*')}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_call(place, tmp_path_factory, capsys, monkeypatch):
    verbs = [*VERBS, 'compare --sweep', 'compare --report']
    flags = {verb: flags_of(verb, capsys) or ['-h'] for verb in verbs}
    count = {0: 0, 2: 0}

    @st.composite
    def calls(draw):
        verb = draw(st.sampled_from(verbs))
        argv = list(draw(st.sampled_from(BASES.get(verb, [('--nosuch',)]))))
        for _ in range(draw(st.integers(0, 3))):
            flag = draw(st.sampled_from(flags[verb]))
            argv += [flag, *draw(values_of(verb, flag))]
        if draw(st.integers(0, 9)) == 0:
            argv.insert(0, draw(st.sampled_from(VALUES)))
        return [*verb.split(), *argv]

    @settings(max_examples=CALLS, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(calls())
    def check(argv):
        folder = tmp_path_factory.mktemp('call', numbered=True) / 'here'
        shutil.copytree(place, folder)
        monkeypatch.chdir(folder)
        before = contents(folder)
        try:
            code = main(argv)
        except SystemExit as e:  # --help
            code = e.code
        except BaseException as e:
            raise AssertionError(f'{argv}: {type(e).__name__}: {e}') from e
        out, err = capsys.readouterr()
        assert code in (0, 2), (argv, code, err)
        if code == 2:
            errors = [line for line in err.splitlines() if line.startswith('error: ')]
            assert len(errors) == 1 and 'Traceback' not in err, (argv, err)
            assert contents(folder) == before, (argv, err)
        count[code] += 1
        monkeypatch.chdir(place)
        shutil.rmtree(folder)

    check()
    print(count, file=sys.stderr)
    assert count[0] >= 20 and count[2] >= 200
