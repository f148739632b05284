"""The C extension is optional: the package builds without a compiler, and without torch."""

import os
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
