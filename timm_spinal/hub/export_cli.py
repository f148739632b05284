"""Export models to ONNX or torch.export, each checked against eager mode.

    timm-spinal export spinalcnn_a1 --format onnx
    timm-spinal export local-dir:runs/my_run --format torch-export --output exports
    timm-spinal export 'spinalcnn_*' 'vgg5*' --table exports.csv             which of them export, in both formats

The batch is free. mean, std, image size and the names of the classes are in the file: as ONNX metadata (each value is
JSON), or as `preprocessing.json` in a torch.export file. --table keeps no files; it writes a row after each model and
goes on where it was.
"""
import glob
import sys
import time
from pathlib import Path
from typing import Any, Sequence

import torch

import timm_spinal
from timm_spinal.arguments import Parser
from timm_spinal.errors import UserError
from timm_spinal.files import read_table
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.model import create_model
from timm_spinal.training.report import write_table

from .export import FORMATS, ExportFailed, export_model

_COLUMNS = ('model', 'format', 'outcome', 'difference', 'megabytes', 'seconds')  # of the table


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal export``; returns the exit code: 1 where a row of the table is no export.

    Raises:
        UserError: Anything a user can mend, and with files every model that does not export; one line.
    """
    args = _parser().parse_args(argv)
    names = find_names(args.models)
    if args.table:
        rows = make_table(names, args.format or list(FORMATS), args.table, args.pretrained)
        print(markdown(rows))
        return int(any(row['outcome'] != 'exports' for row in rows))
    for name in names:
        for kind in args.format or ['onnx']:
            file = args.output / (file_stem(name) + FORMATS[kind].suffix)
            done = export_model(load(name, args.pretrained), kind, file, name)
            print(f'{done.file}: {done.megabytes:.1f} MB, differs from eager mode by at most {done.difference:.1e} of '
                  'the greatest logit')
    return 0


def _parser() -> Parser:
    parser = Parser('timm-spinal export', __doc__)
    parser.add_argument('models', nargs='+', metavar='MODEL',
                        help='names, local-dir:RUN, hf-hub:OWNER/NAME, or wildcards of the names of this package')
    parser.add_argument('--format', nargs='+', choices=list(FORMATS), help='not given: onnx; for a table all')
    parser.add_argument('--output', type=Path, default=Path('.'), metavar='DIR', help='folder of the files')
    parser.add_argument('--pretrained', action='store_true', help='with pretrained weights; saved models have theirs')
    parser.add_argument('--table', type=Path, metavar='FILE', help='write which of them export to this .csv file')
    return parser


def find_names(patterns: Sequence[str]) -> list[str]:
    """The models that names and wildcards stand for, each once.

    Raises:
        UserError: A wildcard that matches nothing.
    """
    names: list[str] = []
    for pattern in patterns:
        found = timm_spinal.list_models(pattern) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise UserError(f"no model of this package matches {pattern!r}; quote wildcards, as in '*spinal*'")
        names += [name for name in found if name not in names]
    return names


def file_stem(name: str) -> str:
    """Name of a model's file without suffix: of a saved model that of its folder or repository."""
    return Path(name.partition(':')[2] or name).name.replace('@', '_')


def load(name: str, pretrained: bool) -> torch.nn.Module:
    """A model to export; without weights it has the same random ones at every call."""
    saved = name.startswith(('local-dir:', 'hf-hub:'))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(ValidateConfig(model=name, pretrained=pretrained or saved), None)


def make_table(names: list[str], kinds: list[str], file: Path, pretrained: bool = False) -> list[dict[str, Any]]:
    """Try every model in every format; a row after each, and those that the file holds already are not done again.

    Returns:
        Rows of ``model``, ``format``, ``outcome`` ('exports' or the reason), ``difference``, ``megabytes``,
        ``seconds``: those of the file, which may be of other models too.
    """
    if file.suffix != '.csv':
        raise UserError(f'--table {file}: unknown format; name a .csv file')
    rows: list[dict[str, Any]] = []
    if file.exists():
        rows = read_table(file, _COLUMNS, _COLUMNS, 'remove it, or name another one')
    done = {(row['model'], row['format']) for row in rows}
    for name in names:
        for kind in kinds:
            if (name, kind) not in done:
                rows.append(_row(name, kind, file.parent, pretrained))
                write_table(file, rows)
                print(f'{name}, {kind}: {rows[-1]["outcome"]}, {rows[-1]["seconds"]} s', flush=True)
    return rows


def _row(name: str, kind: str, folder: Path, pretrained: bool) -> dict[str, Any]:
    start = time.perf_counter()
    row: dict[str, Any] = dict(model=name, format=kind, outcome='exports', difference='', megabytes='')
    file = folder / f'.export_table{FORMATS[kind].suffix}'
    try:
        result = export_model(load(name, pretrained), kind, file, name)
        row.update(difference=f'{result.difference:.1e}', megabytes=f'{result.megabytes:.1f}')
    except ExportFailed as e:
        row.update(outcome=str(e).removeprefix(f'{name}: '))
    finally:
        for part in folder.glob(f'{file.name}*'):
            part.unlink()
    return dict(row, seconds=f'{time.perf_counter() - start:.1f}')


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each model, a column for each format; what does not export says why."""
    kinds = list(dict.fromkeys(row['format'] for row in rows))
    lines = [f'| model | {" | ".join(kinds)} |', '|---' * (len(kinds) + 1) + '|']
    for name in dict.fromkeys(row['model'] for row in rows):
        cells = {row['format']: f'yes ({row["difference"]})' if row['outcome'] == 'exports' else row['outcome']
                 for row in rows if row['model'] == name}
        lines.append(f'| `{name}` | {" | ".join(cells.get(kind, "") for kind in kinds)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    from timm_spinal.cli import guard
    sys.exit(guard(main, sys.argv[1:]))
