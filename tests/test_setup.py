"""What is installed: the C extension, which is optional, and the configs beside the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_builds_without_a_compiler(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    env = dict(os.environ, CC='/nonexistent/cc')
    command = [sys.executable, 'setup.py', 'build_ext', '--build-lib', str(tmp_path), '--build-temp', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob('*.so')) == [] and '_kernels' in done.stdout + done.stderr


def test_sources_need_neither_python_nor_torch():
    names = ('xnor.c', 'xnor.h', 'shared_basis.c', 'dropout.c', 'sparse_product.c', 'vectors.h')
    sources = [ROOT / 'timm_spinal' / 'layers' / name for name in names]
    included = {line.split()[1] for file in sources for line in file.read_text().splitlines()
                if line.startswith('#include')}
    assert included == {'<math.h>', '<stddef.h>', '<stdint.h>', '<stdlib.h>', '<string.h>', '"xnor.h"', '"vectors.h"',
                        '<immintrin.h>', '<arm_neon.h>'}


READ = '''
import sys
sys.path += [{where!r}, *{more!r}]  # and what else is installed, without the files there that add further folders
import site
site.addsitedir({where!r})
from timm_spinal.training.config import find_config, parse_config
print(find_config('finetune'))
print(parse_config(['--config', 'finetune', '--data-dir', 'images']).min_updates)
'''


@pytest.mark.parametrize('kind', ['wheel', 'sdist', 'editable'])
def test_configs_are_found_by_name_where_only_the_package_is(tmp_path, kind):
    pytest.importorskip('setuptools', minversion='77')
    source = tmp_path / 'source'
    for name in ('timm_spinal', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', '*.so'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    made = build(source, tmp_path / 'made', kind)
    if kind == 'sdist':
        shutil.unpack_archive(made, tmp_path / 'unpacked')
        made = build(next((tmp_path / 'unpacked').iterdir()), tmp_path / 'made', 'wheel')
    if kind != 'editable':
        shutil.rmtree(source)
    shutil.unpack_archive(made, tmp_path / 'site', 'zip')
    code = READ.format(more=[path for path in sys.path if 'site-packages' in path], where=str(tmp_path / 'site'))
    done = subprocess.run([sys.executable, '-S', '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    assert done.returncode == 0, done.stderr
    where, updates = done.stdout.split()
    inside = source if kind == 'editable' else tmp_path / 'site' / 'timm_spinal'
    assert where == str(inside / 'configs' / 'finetune.yaml') and int(updates) > 100


def build(source, folder, kind):
    code = f'import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})'
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, '-c', code], cwd=source, env=dict(os.environ, CC='/nonexistent/cc'),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return next(path for path in folder.iterdir() if path.suffix in ('.whl', '.gz') and
                (kind == 'sdist') == (path.suffix == '.gz'))
