"""What an installation needs: no compiler, no torch to build, and the dependencies that pyproject.toml declares."""

import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, tools of the tests left out."""
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 reads TOML')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = (rows for name, rows in project['optional-dependencies'].items() if name != 'test')
    return [Requirement(row) for row in chain(project['dependencies'], *extras)]


def test_lower_bounds_are_versions_that_the_tests_ran_with():
    """`.ci/lowest.txt` lists the environment of that run; ONNX has no bound, torch's exporter names what it needs."""
    lines = (ROOT / '.ci' / 'lowest.txt').read_text().splitlines()
    run = {canonicalize_name(row.name): str(row.specifier) for row in map(Requirement, (
        line for line in lines if line and not line.startswith('#')))}
    bounds = {canonicalize_name(row.name): str(row.specifier).replace('>=', '==') for row in declared()}
    assert {name: bound for name, bound in bounds.items() if bound} == run
    assert {name for name, bound in bounds.items() if not bound} == {'onnx', 'onnxscript', 'onnxruntime'}


def test_what_is_imported_is_declared():
    imported = set()
    for file in (ROOT / 'timm_spinal').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition('.')[0])
    imported -= {*sys.stdlib_module_names, 'timm_spinal'}
    packages = packages_distributions()
    needed = {canonicalize_name(packages.get(name, [name])[0]) for name in imported}
    assert {'numpy', 'pillow', 'torch', 'timm'} <= needed
    assert needed <= {canonicalize_name(row.name) for row in declared()}
