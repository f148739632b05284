"""Imports run downward only: a folder of the package imports folders below it, and no others."""
import ast
from pathlib import Path

import pytest

import timm_spinal

PACKAGE = Path(timm_spinal.__file__).parent
BELOW = {
    'layers': set(),
    'models': {'layers'},
    'evaluation': {'models', 'layers'},
    'training': {'evaluation', 'models', 'layers'},
    'compare': {'training', 'evaluation', 'models', 'layers'},
    'detection': {'training', 'evaluation', 'models', 'layers'},
    'hub': {'compare', 'training', 'evaluation', 'models', 'layers'},
    'see': {'hub', 'detection', 'training', 'evaluation', 'models', 'layers'},
    'bench': {'compare', 'training', 'evaluation', 'models', 'layers'},
}


def imported(path):
    """Folders of the package from which a file imports, wherever in it."""
    folders = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(PACKAGE.parent).parent.parts
            start = '.'.join(inside[:len(inside) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, (start, node.module)))
            names = [module, *(f'{module}.{alias.name}' for alias in node.names)]
        folders |= {name.split('.')[1] for name in names if name.startswith('timm_spinal.')}
    return folders & set(BELOW)


@pytest.mark.parametrize('folder', BELOW)
def test_imports_run_downward(folder):
    files = list((PACKAGE / folder).rglob('*.py'))
    upward = {str(path.relative_to(PACKAGE)): found for path in files
              if (found := imported(path) - BELOW[folder] - {folder})}
    assert files and not upward


def test_every_folder_of_code_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
    assert folders - {'weights'} == set(BELOW)
