"""Private names of other libraries that the package uses: each is listed here with the reason why it may."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from timm.task import ClassificationEvaluator
from torch import nn

import timm_spinal

PACKAGE = Path(timm_spinal.__file__).parent
LIBRARIES = ('torch', 'torchvision', 'timm', 'accelerate', 'huggingface_hub', 'safetensors')

# names of imported things in full; ``.name`` is an attribute of an object, whose class the source does not tell
ALLOWED = {
    'torch._assert': 'a check that torch.fx can trace',
    'torch.nn.modules.batchnorm._BatchNorm': 'the base class of all BatchNorm layers, SyncBatchNorm among them',
    'torch.utils._python_dispatch.TorchDispatchMode': 'sees each operator of a forward pass',
    'torch.utils._pytree.tree_map': 'maps over the tensors of nested results',
    '._load_from_state_dict': 'a module refuses weights before any of them is loaded',
    '._accumulate_loss': "timm's ClassificationEvaluator, of which one for two classes is derived",
    '._summary': "timm's ClassificationEvaluator, of which one for two classes is derived",
    '._prepare': "timm's ClassificationEvaluator, of which one for two classes is derived",
    '._erase': "timm's RandomErasing, of which only the choice of places is wanted",
    '._params_per_elem': "timm's Mixup, of which a form without waits is derived",
    '._version': 'counts the changes of a tensor',
    '._samples': "the files of torchvision's data sets",
    '._actions': 'the options of a parser of argparse, by which an unknown one is answered',
}
NAMED_TUPLE = {'_asdict', '_fields', '_make', '_replace'}  # Python's own, and public


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.endswith('__') and name != '_'


def dotted(node: ast.AST) -> list[str]:
    """The parts of a.b.c; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*([node.id] if isinstance(node, ast.Name) else ['']), *reversed(parts)]


def imported(tree: ast.Module) -> dict[str, str]:
    """Local names of what is imported from the libraries, with their full names."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition('.')[0] in LIBRARIES:
                    names[alias.asname or alias.name.partition('.')[0]] = alias.name if alias.asname else \
                        alias.name.partition('.')[0]
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).partition('.')[0] in LIBRARIES:
            for alias in node.names:
                names[alias.asname or alias.name] = f'{node.module}.{alias.name}'
    return names


def defined(trees: list[ast.Module]) -> set[str]:
    """Private names that the package gives to its own functions, classes, variables and attributes."""
    own = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            own.add(node.id if isinstance(node, ast.Name) else node.attr)
    return own


def of_instances() -> set[str]:
    """Private attributes of objects that the package derives from, and may override or write."""
    things = (nn.Conv2d(1, 1, 1), timm.create_model('test_vit'), ClassificationEvaluator)
    return {name for thing in things for name in dir(thing) if is_private(name)}


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of the libraries in one file; ``own`` are attributes that are none of theirs."""
    names = imported(tree)
    yield from (full for full in names.values() if any(map(is_private, full.split('.'))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root, *rest = dotted(node)
            if root in names:
                yield '.'.join([names[root], *rest])
            elif node.attr not in own:
                yield f'.{node.attr}'
        elif isinstance(node, ast.Call) and dotted(node.func) in (['getattr'], ['setattr'], ['hasattr']):
            name = getattr(node.args[1], 'value', None)
            if isinstance(name, str) and is_private(name) and name not in own:
                yield f'.{name}'
        elif isinstance(node, ast.ClassDef):
            yield from (f'.{part.name}' for part in node.body if isinstance(part, ast.FunctionDef)
                        and is_private(part.name) and part.name not in own)


def uses_in(files: dict[str, str]) -> dict[str, set[str]]:
    """Each private name of the libraries with the files that use it, from the sources by file."""
    trees = {file: ast.parse(source) for file, source in files.items()}
    own = (defined(list(trees.values())) | NAMED_TUPLE) - of_instances()
    uses: dict[str, set[str]] = {}
    for file, tree in trees.items():
        for name in private_uses(tree, own):
            uses.setdefault(name, set()).add(file)
    return uses


def test_every_private_name_is_listed_and_used():
    uses = uses_in({str(f.relative_to(PACKAGE)): f.read_text(encoding='utf-8') for f in PACKAGE.rglob('*.py')
                    if f.name != '_timm.py'})  # of timm they stand there, see tests/models/test_timm.py
    new = {name: sorted(files) for name, files in uses.items() if name not in ALLOWED}
    assert not new, f'private names of other libraries, for which there may be public ones: {new}'
    assert set(ALLOWED) - set(uses) == set(), 'listed, but used no more'


@pytest.mark.parametrize('source, names', [
    ('import torch\ntorch._C._functorch.peek()', {'torch._C', 'torch._C._functorch'}),
    ('import torch\ntorch.ops.mkldnn._reorder(1)', {'torch.ops.mkldnn._reorder'}),
    ('from accelerate.state import AcceleratorState as S\nS._reset_state()',
     {'accelerate.state.AcceleratorState._reset_state'}),
    ('from timm.models import _hub', {'timm.models._hub'}),
    ('from huggingface_hub.utils._http import x', {'huggingface_hub.utils._http.x'}),
    ('import torch.nn as nn\nclass A(nn.Conv2d):\n def f(self):\n  return self._reversed_padding_repeated_twice',
     {'._reversed_padding_repeated_twice'}),
    ('def f(module):\n return module._forward_hooks or getattr(module, "_buffers")', {'._forward_hooks', '._buffers'}),
    ('class A:\n def _load_from_state_dict(self):\n  pass', {'._load_from_state_dict'}),
    ('import torch\nfrom . import _own\nclass A:\n def _f(self):\n  self._g = _own.x\n  return self._g', set()),
    ('from typing import NamedTuple\ndef f(row: NamedTuple):\n return row._asdict(), row.__class__', set()),
])
def test_what_is_a_private_name_of_another_library(source, names):
    assert set(uses_in({'file.py': source})) == names
