"""The commands of README.md and docs/*.md.

Every command line is parsed by the parser that it is for. Every block runs on small data, in the order of its page and
in a folder that the page has for itself, or says before it why it cannot: ``<!-- not run: REASON -->``.
"""
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import timm

from timm_spinal.arguments import Parser
from timm_spinal.cli import VERBS, main
from timm_spinal.training import parser as config_parser

from ..conftest import launch_command, launch_env
from ..detection.shapes import write_coco
from ..training.images import REAL, make_folder, write_idx
from .generate import ROOT

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
RECORDS = {'results.md', 'benchmarks.md'}  # generated; they tell commands as they were at the commit of a measurement
BLOCK = re.compile(r'^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$', re.M | re.S)
SHOWN = {'text'}  # languages of blocks that are no commands
MODULES = {f'timm_spinal{name}': verb for name, verb in (
    ('.train', 'train'), ('.validate', 'validate'), ('.detection.train', 'train-detection'))}

# What makes a command small, appended to it: later flags win.
TRAIN = '--no-pretrained --epochs 2 --min-updates 0 --freeze-epochs 0 --batch-size 8 --workers 0 --log-interval 1000'
SMALL = {
    'train': TRAIN, 'gradflow': TRAIN,
    'train-detection': '--no-pretrained-backbone --epochs 1 --batch-size 2 --workers 0 --min-size 64 --max-size 96',
    'predict': '--workers 0', 'explain': '', 'demo': '',
    'compare': '--no-pretrained --epochs 2 --workers 0', 'validate': '--workers 0', 'verify': '--workers 0',
}
ADDED = {  # to commands that have this
    'my/images': '--img-size 32', '--ic-warm-start': '--pretrained-path plain.safetensors',
}
OWN_SIZE = {'validate', 'verify', 'predict', 'explain', 'demo'}  # take the image size of the run
MY_YAML = 'model: test_efficientnet\ndata_dir: my/images\nimg_size: 32\nepochs: 2\nbatch_size: 8\nworkers: 0\n'
SWEEP = {'seeds: 3': 'seeds: 1', 'epochs: 10': 'epochs: 1', 'batch_size: 128': 'batch_size: 8\n  workers: 0'}


class Block(NamedTuple):
    page: Path
    line: int
    reason: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'

    @property
    def needs_files(self) -> bool:
        """Whether it reads what the commands before it have written."""
        return bool(re.search(r'output/|my/|:folder|\'folder', self.text))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding='utf-8')
    return [Block(page, text.count('\n', 0, found.start('text')), found['reason'] or '', found['language'],
                  found['text']) for found in BLOCK.finditer(text)]


BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language not in SHOWN]
PYTHON = [block for block in BLOCKS if block.language == 'python' and not block.reason and not block.needs_files]


def commands_of(block: Block) -> Iterator[str]:
    for line in block.text.replace('\\\n', ' ').splitlines():
        for command in line.split('&&'):
            if words := shlex.split(command, comments=True):
                yield shlex.join(words)


COMMANDS = [(block, command) for block in BLOCKS if block.language == 'bash' for command in commands_of(block)]


def verb_of(words: list[str]) -> tuple[str, list[str]]:
    """The verb of timm-spinal that a command calls, '' for none, and its arguments."""
    if words[0] == 'timm-spinal':
        return words[1], words[2:]
    if '-m' in words and (verb := MODULES.get(words[words.index('-m') + 1])):
        return verb, words[words.index('-m') + 2:]
    return '', words


# ---- quick: all blocks are counted, all commands parsed, Python that needs no run is run ---------------------------


def test_every_block_is_run_or_marked():
    for page in PAGES:
        text, blocks = page.read_text(encoding='utf-8'), blocks_of(page)
        assert 2 * len(blocks) == len(re.findall(r'^ *```', text, re.M)), page.name
        assert {block.language for block in blocks} <= {'bash', 'python', *SHOWN}, page.name
        assert text.count('not run: ') == sum(bool(block.reason) for block in blocks), f'{page.name}: a mark too many'
    assert len(BLOCKS) > 30 and sum(bool(block.reason) for block in BLOCKS) < len(BLOCKS) // 4


class Parsed(Exception):
    """The arguments are right; nothing is done with them."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Commands end by `Parsed` when their own parser has taken the arguments, and a config has been checked."""
    parse_args, check_options = Parser.parse_args, config_parser.check_options

    def parse(self, *args, **kwargs):
        values = parse_args(self, *args, **kwargs)
        if isinstance(self, config_parser._ConfigParser):
            return values  # checked below
        raise Parsed

    def check(*args, **kwargs):
        check_options(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(Parser, 'parse_args', parse)
    monkeypatch.setattr(config_parser, 'check_options', check)


def check_command(command: str) -> None:
    """Take a command apart as the program does that it calls; raises what that raises."""
    words = [word for i, word in enumerate(shlex.split(command)) if i or '=' not in word]
    if words[:2] == ['accelerate', 'launch']:
        from accelerate.commands.launch import launch_command_parser
        args = launch_command_parser().parse_args(words[2:])
        assert args.module and importlib.util.find_spec(args.training_script), command
    verb, arguments = verb_of(words)
    if verb:
        with pytest.raises(Parsed):
            code = main([verb, *arguments])
            pytest.fail(f'{command}: exit code {code}')
    elif words[:2] == ['pip', 'install']:
        extras = (ROOT / 'pyproject.toml').read_text().partition('optional-dependencies]')[2].partition('[project.')[0]
        assert set(re.findall(r'\w+', words[-1])) <= set(re.findall(r'^(\w+) =', extras, re.M)), command
    else:
        known = 'git clone ', 'hf jobs ', 'cd ', 'python -m venv ', '. '
        assert command.startswith(known), f'{command}: who parses it?'


@pytest.mark.parametrize('block, command', COMMANDS, ids=[f'{b.place} {command[:40]}' for b, command in COMMANDS])
def test_command_is_parsed(block, command, stop_after_parsing, tmp_path, monkeypatch):
    (tmp_path / 'my.yaml').write_text(MY_YAML)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    check_command(command)


@pytest.mark.parametrize('command', [
    'timm-spinal train --modle resnet18', 'timm-spinal trian', 'timm-spinal compare --heads linear --seed-count 3',
    'accelerate launch -m timm_spinal.train --epochs many', 'timm-spinal bench --round 3', 'rm -r output',
    'pip install -e ".[digit]"',
])
def test_wrong_command_is_found(command, stop_after_parsing):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(command)


def test_options_in_the_text_exist():
    # of accelerate and hf
    known = {'--cpu', '--num_processes', '--multi_gpu', '--use_fsdp', '--fsdp_version', '--with',
             '--fsdp_cpu_ram_efficient_loading', '--fsdp_auto_wrap_policy'}
    for argv in (*([verb] for verb in VERBS), ['compare', '--sweep'], ['compare', '--report']):
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            main([*argv, '--help'])
        known |= set(re.findall(r'--[a-z][\w-]*', out.getvalue()))
    known |= {f'--no-{flag[2:]}' for flag in known}
    for page in (page for page in PAGES if page.name not in RECORDS):
        text = re.sub(r'^```.*?^```$|<!--.*?-->', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
        for code in re.findall(r'`([^`]+)`', text):
            if not code.startswith('accelerate config') and '--amp' not in code:  # timm's own option
                assert set(re.findall(r'(?<!\w)--[a-z][\w-]*', code)) <= known, f'{page.name}: {code}'


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / 'hub_cards' / 'README.md']:
        for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
            path, _, heading = target.partition('#')
            if not target.startswith('http'):
                assert (page.parent / path).exists(), f'{page.name}: {target}'
                headings = re.findall(r'^#+ (.+)$', (page.parent / path).read_text(), re.M) if heading else ['']
                assert heading in [re.sub(r'\W+', '-', title.lower()) for title in headings], f'{page.name}: {target}'


def child(folder: Path, kind: str, what) -> None:
    """In a process of its own: run Python, or a command line of timm-spinal."""
    os.chdir(folder)
    log = os.open(folder / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        code = main(what) if kind == 'timm-spinal' else exec(compile(what, 'block', 'exec'), {'__name__': 'block'})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code or 0)


def fork(folder: Path, kind: str, what, place: str) -> None:
    """`child` in a fork of a process that has imported the package, which is quicker than one from scratch."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_spinal.cli', 'timm_spinal.training.train', __name__])
    process = context.Process(target=child, args=(folder, kind, what))
    process.start()
    process.join()
    assert process.exitcode == 0, f'{place}: {what}\n{(folder / "log.txt").read_text()[-4000:]}'


def python_of(block: Block) -> str:
    """Without downloads: weights that are neither in the package nor in a folder are left out."""
    return re.sub(r"(create_model\('\w+', )pretrained=True", r'\1pretrained=False', block.text)


@pytest.mark.slow
@pytest.mark.parametrize('block', PYTHON, ids=lambda block: block.place)
def test_python_runs(block, tmp_path):
    fork(tmp_path, 'python', python_of(block), block.place)


# ---- slow: whole pages -------------------------------------------------------------------------------------------


def add_flowers(images: Path, classes: int = 4, each: int = 10) -> None:
    """Some of Flowers-102 as further classes, where it is there."""
    if not (REAL / 'flowers102_64').is_dir():
        return
    known = np.load(REAL / 'flowers102_64' / 'labels_and_splits.npz')
    with zipfile.ZipFile(REAL / 'flowers102_64' / 'flowers102_64.zip') as pack:
        for split, ids in (('train', 'train_ids'), ('validation', 'val_ids'), ('test', 'test_ids')):
            for label in range(1, classes + 1):
                folder = images / split / f'flower {label}'
                folder.mkdir(parents=True)
                of_class = [i for i in known[ids] if known['labels_1based'][i - 1] == label]
                for i in of_class[:each]:
                    (folder / f'{i}.jpg').write_bytes(pack.read(f'image_{i:05}.jpg'))


@pytest.fixture
def folder(tmp_path, page):
    """A clone with a user's data in it."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    sweep = tmp_path / 'configs' / 'sweeps' / 'cifar10_heads.yaml'
    text = sweep.read_text()
    for old, new in SWEEP.items():
        assert old in text
        text = text.replace(old, new)
    sweep.write_text(text)
    make_folder(tmp_path / 'my' / 'images', ('train', 'validation', 'test'), per_class=40, size=32)
    if page.name == 'own_pictures.md':
        add_flowers(tmp_path / 'my' / 'images')
    shutil.copy(next((tmp_path / 'my' / 'images').rglob('*.png')), tmp_path / 'my' / 'image.jpg')
    write_coco(tmp_path / 'my' / 'coco', train=4, validation=2)
    raw = tmp_path / 'data' / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True, exist_ok=True)
    for part in ('train', 't10k'):
        write_idx(raw / f'{part}-images-idx3-ubyte', np.random.default_rng(0).integers(0, 256, (60, 28, 28)))
        write_idx(raw / f'{part}-labels-idx1-ubyte', np.arange(60) % 10)
    (tmp_path / 'my.yaml').write_text(MY_YAML)
    plain = timm.create_model('resnet18', num_classes=2)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    return tmp_path


def small(words: list[str]) -> list[str]:
    """The command with what makes it small."""
    verb, arguments = verb_of(words)
    added = '' if {'--sweep', '--report'} & set(arguments) or 'my.yaml' in arguments else SMALL.get(verb, '')
    if added:
        command = shlex.join(arguments)
        added += ''.join(f' {flags}' for text, flags in ADDED.items() if text in command and verb not in OWN_SIZE)
    return [*words, *added.split()]


def run_command(words: list[str], folder: Path, place: str) -> None:
    words = small(words)
    if words[:2] == ['timm-spinal', 'demo'] and '--space' not in words:
        return open_and_close(words, folder, place)
    if words[0] == 'timm-spinal':
        return fork(folder, 'timm-spinal', words[1:], place)
    env = launch_env()
    while '=' in words[0]:
        name, _, env[name] = words.pop(0).partition('=')
    program = dict(accelerate=launch_command(1), torchrun=[sys.executable, '-m', 'torch.distributed.run'])[words[0]]
    words = [*program, *words[2 if words[0] == 'accelerate' else 1:]]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f'{place}: {words}\n{(done.stdout + done.stderr)[-4000:]}'


def open_and_close(words: list[str], folder: Path, place: str) -> None:
    """A command that runs until it is stopped."""
    command = [sys.executable, '-m', 'timm_spinal.cli', *words[1:]]
    process = subprocess.Popen(command, cwd=folder, env=launch_env(), stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    process.terminate()
    process.wait(60)
    assert line.startswith('open http://127.0.0.1:'), f'{place}: {words}: {line}'


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('page', [page for page in PAGES if any(
    block.page == page and not block.reason and block not in PYTHON for block in BLOCKS)], ids=lambda page: page.name)
def test_page_runs(page, folder):
    """All of its blocks that have no mark, one after the other."""
    for block in (block for block in BLOCKS if block.page == page and not block.reason):
        if block.language == 'python':
            fork(folder, 'python', python_of(block), block.place)
        else:
            for command in commands_of(block):
                run_command(shlex.split(command), folder, block.place)
