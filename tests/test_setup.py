"""What an installation needs and holds: no compiler, no torch to build, declared dependencies, the configs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import timm_spinal
from timm_spinal.cli import VERBS

ROOT = Path(__file__).parents[1]


def test_builds_without_a_compiler(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    env = dict(os.environ, CC='/nonexistent/cc')
    command = [sys.executable, 'setup.py', 'build_ext', '--build-lib', str(tmp_path), '--build-temp', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob('*.so')) == [] and '_xnor' in done.stdout + done.stderr


def test_source_needs_neither_python_nor_torch():
    lines = (ROOT / 'timm_spinal' / 'layers' / 'xnor' / 'xnor.c').read_text().splitlines()
    included = {line.split()[1] for line in lines if line.startswith('#include')}
    of_c = {'<math.h>', '<stddef.h>', '<stdint.h>', '<stdlib.h>', '<string.h>'}
    assert included == {*of_c, '<immintrin.h>', '<arm_neon.h>'}


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 reads TOML')
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / '.github' / 'workflows' / f'{name}.yml').read_text())['jobs']


def commands(job: dict[str, Any]) -> list[str]:
    return [step['run'] for step in job['steps'] if 'run' in step]


def test_versions_of_python_are_the_same_everywhere():
    """Of the metadata, the linters, the wheel and CI, which runs every version that is declared."""
    settings = pyproject()
    project, tools = settings['project'], settings['tool']
    python = 'Programming Language :: Python :: 3.'
    minors = [int(row.removeprefix(python)) for row in project['classifiers'] if row.startswith(python)]
    lowest = minors[0]
    assert minors == list(range(lowest, minors[-1] + 1)) and sys.version_info[0] == 3 and sys.version_info[1] >= lowest
    assert project['requires-python'] == f'>=3.{lowest}'
    assert tools['ruff']['target-version'] == f'py3{lowest}' and tools['mypy']['python_version'] == f'3.{lowest}'
    assert tools['cibuildwheel']['build'] == f'cp3{lowest}-*'
    assert f"'py_limited_api': 'cp3{lowest}'" in (ROOT / 'setup.py').read_text()
    check = workflow('ci')['check']
    assert check['strategy']['matrix']['python-version'] == [f'3.{minor}' for minor in minors]


def test_workflows_run_the_scripts_of_the_repository():
    assert commands(workflow('ci')['check']) == ['bash .ci/run']
    jobs = workflow('wheels')
    assert commands(jobs['quickstart']) == ['bash .ci/package']
    assert all((ROOT / '.ci' / name).stat().st_mode & 0o100 for name in ('run', 'package', 'lowest'))
    install, build = commands(jobs['wheels'])
    assert re.fullmatch(r'python -m pip install cibuildwheel==\d+\.\d+\.\d+', install)
    assert build == 'python -m cibuildwheel --output-dir dist' and 'xnor_backend()' in pyproject()['tool'][
        'cibuildwheel']['test-command']
    assert jobs['publish']['if'] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert set(jobs['publish']['needs']) == set(jobs) - {'publish'}
    assert 'secrets' not in (ROOT / '.github' / 'workflows' / 'wheels.yml').read_text()


def test_changelog_begins_with_the_version():
    headings = re.findall(r'^## \[(.+?)\] - (?:unreleased|\d{4}-\d\d-\d\d)$', (ROOT / 'CHANGELOG.md').read_text(), re.M)
    assert headings[0] == timm_spinal.__version__


def test_forms_name_commands_that_there_are():
    """And the one for bugs does not go off without the output of `timm-spinal env`."""
    forms = {path.stem: path.read_text() for path in (ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*.yml')}
    assert set(re.findall(r'timm-spinal ([a-z-]+)', ''.join(forms.values()))) <= set(VERBS)
    fields = {field.get('id'): field for field in yaml.safe_load(forms['bug'])['body']}
    assert fields['env']['validations']['required'] and '`timm-spinal env`' in fields['env']['attributes']['label']


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, tools of the tests left out."""
    project = pyproject()['project']
    extras = (rows for name, rows in project['optional-dependencies'].items() if name != 'test')
    return [Requirement(row) for row in chain(project['dependencies'], *extras)]


def test_lower_bounds_are_versions_that_the_tests_ran_with():
    """`.ci/lowest.txt` lists the environment of that run; ONNX has no bound, torch's exporter names what it needs."""
    lines = (ROOT / '.ci' / 'lowest.txt').read_text().splitlines()
    run = {canonicalize_name(row.name): str(row.specifier) for row in map(Requirement, (
        line for line in lines if line and not line.startswith('#')))}
    bounds = {canonicalize_name(row.name): ''.join(
        f'=={bound.version}' for bound in row.specifier if bound.operator == '>=') for row in declared()}
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


FILES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CITATION.cff')
READ = '''
import sys
sys.path += [{where!r}, *{more!r}]  # and what else is installed, without the files there that add further folders
import site
site.addsitedir({where!r})
from timm_spinal.training.parser import find_config, parse_config
print(find_config('finetune'))
print(parse_config(['--config', 'finetune', '--data-dir', 'images']).min_updates)
'''


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['wheel', 'sdist', 'editable'])
def test_configs_are_found_by_name_where_only_the_package_is(tmp_path, kind):
    pytest.importorskip('setuptools', minversion='77')
    source = tmp_path / 'source'
    for name in ('timm_spinal', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', '*.so'))
    (source / 'tests').mkdir()
    for name in (*FILES, 'tests/test_setup.py'):
        shutil.copy(ROOT / name, source / name)
    made = build(source, tmp_path / 'made', kind)
    if kind == 'sdist':
        check_contents(made, source)
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


def check_contents(sdist, source):
    """The files of the root, and every file of package and configs; no tests."""
    with tarfile.open(sdist) as archive:
        files = {name.partition('/')[2] for name in archive.getnames() if '.egg-info' not in name}
    of_package = {str(path.relative_to(source)) for name in ('timm_spinal', 'configs')
                  for path in (source / name).rglob('*') if path.is_file()}
    assert len(of_package) > 200 and of_package <= files
    top = {name for name in files - of_package if '.' in name} - {'PKG-INFO', 'setup.cfg'}
    assert top == {*FILES} - {'LICENSE'} and 'LICENSE' in files and 'tests' not in files


def build(source, folder, kind):
    code = f'import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})'
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, '-c', code], cwd=source, env=dict(os.environ, CC='/nonexistent/cc'),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return next(path for path in folder.iterdir() if path.suffix in ('.whl', '.gz') and
                (kind == 'sdist') == (path.suffix == '.gz'))
