"""xnor.c as a program of its own, for this processor, and for ARM where a cross compiler and QEMU are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

import timm_spinal.layers.xnor
from timm_spinal.layers.xnor import library

SOURCE = Path(timm_spinal.layers.xnor.__file__).parent
COMPILERS = {'native': ('cc', []), 'arm': ('aarch64-linux-gnu-gcc', ['qemu-aarch64'])}


def run(folder: Path, name: str, include: Path) -> subprocess.CompletedProcess:
    compiler, runner = COMPILERS[name]
    if any(shutil.which(tool) is None for tool in (compiler, *runner)):
        pytest.skip(f'no {" or ".join((compiler, *runner))}')
    program = folder / name
    static = ['-static'] if runner else []
    command = [compiler, '-O3', '-Wno-psabi', *static, f'-I{include}',
               str(Path(__file__).parent / 'compare_paths.c'), '-o', str(program), '-lm']
    subprocess.run(command, check=True, timeout=100)
    return subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize('name', COMPILERS)
def test_every_path_computes_what_portable_c_does(name, tmp_path):
    done = run(tmp_path, name, SOURCE)
    assert done.returncode == 0
    expected = ['portable', 'neon'] if name == 'arm' else library.xnor_paths()[1:]
    assert done.stdout.split() == expected or library.xnor_paths() == ['torch']


@pytest.mark.slow
@pytest.mark.parametrize('name, right, wrong', [
    ('arm', 'vaddq_s8(count, count)', 'count'),
    ('arm', '{1, 2, 4, 8, 16, 32, 64, 128}', '{1, 2, 4, 8, 16, 32, 128, 64}'),
    ('native', '_mm256_srli_epi16(v, 4)', '_mm256_srli_epi16(v, 3)'),
])
def test_a_wrong_path_is_found(name, right, wrong, tmp_path):
    code = (SOURCE / 'xnor.c').read_text()
    assert code.count(right) == 1
    if name == 'native' and library.xnor_paths()[-1] != 'avx2':
        pytest.skip('no AVX2')
    (tmp_path / 'xnor.c').write_text(code.replace(right, wrong))
    assert run(tmp_path, name, tmp_path).returncode == 1
