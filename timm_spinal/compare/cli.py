"""Which head, or any other choice, helps on some data.

    timm-spinal compare --backbone resnet50 --pretrained --data-dir my/images --heads linear,mlp,spinal --seeds 5
    timm-spinal compare --sweep configs/sweeps/cifar10_heads.yaml --jobs 2
    timm-spinal compare --report output/compare/cifar10_heads

The first form trains heads on features of a frozen backbone, which is run once over the images. The second form trains
whole networks, each in a run folder of the trainer. The third one writes the report of either form again.
Each writes results.csv, table.md, table.html, accuracy.png, curves.png and report.md into its folder.
"""
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Sequence

from timm_spinal.arguments import Parser, number
from timm_spinal.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal compare``; returns the exit code: 1 where runs of a sweep failed.

    Raises:
        UserError: Anything a user can mend; one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec('scipy') is None:
        raise UserError("compare: SciPy, which does the statistics, is not installed; pip install "
                        "'timm-spinal[compare]'")
    command = f'timm-spinal compare {shlex.join(argv)}'
    flags = {arg.partition('=')[0] for arg in argv}
    if flags & {'-h', '--help'}:
        argv = ['--help']  # not as the value of --sweep or --report
    if '--sweep' in flags:
        return _sweep(argv, command)
    if '--report' in flags:
        return _report(argv, command)
    from timm_spinal.training.parser import parse_config

    from .frozen import compare_frozen
    from .options import FrozenConfig
    output = compare_frozen(parse_config(argv, FrozenConfig, 'timm-spinal compare', __doc__), command)  # type: ignore
    if output is not None:
        show(output)
    return 0


def _sweep(argv: list[str], command: str) -> int:
    parser = Parser('timm-spinal compare --sweep', __doc__)
    parser.add_argument('--sweep', required=True, metavar='FILE', help='YAML of shared options, variants and seeds')
    parser.add_argument('--jobs', type=number(), default=1, help='trainings at a time')
    parser.add_argument('--data-dir', default='', help='folder of the data; overrides that of the file')
    parser.add_argument('--output', default='', help='folder of the comparison; overrides that of the file')
    _add_extras(parser)
    args = parser.parse_args(argv)
    from .sweep import run_sweep
    from .sweep_file import read_sweep
    sweep = read_sweep(Path(args.sweep), args.output, args.data_dir)
    output, failed = run_sweep(sweep, args.jobs, command, args.per_class, args.calibration)
    show(output)
    return 1 if failed else 0


def _add_extras(parser: Parser) -> None:
    parser.add_argument('--per-class', action='store_true', help='write per_class.csv, the test accuracy of each class')
    parser.add_argument('--calibration', action='store_true', help='draw calibration.png, with calibration errors')


def _report(argv: list[str], command: str) -> int:
    parser = Parser('timm-spinal compare --report', __doc__)
    parser.add_argument('--report', required=True, nargs='+', metavar='DIR',
                        help='folders of comparisons, or run folders of the trainer to compare with each other')
    parser.add_argument('--output', default='output/compare/report', help='folder for a report on run folders')
    parser.add_argument('--control', default='', help='variant that the others are compared with')
    _add_extras(parser)
    args = parser.parse_args(argv)
    from .report import write_report
    from .runs import comparisons_in
    for output, comparison in comparisons_in([Path(d) for d in args.report], Path(args.output), args.control, command):
        write_report(output, comparison, args.per_class, args.calibration)
        show(output)
    return 0


def show(output: Path) -> None:
    """Print the table and where the rest is."""
    text = (output / 'report.md').read_text(encoding='utf-8')
    findings = text.partition('## Found\n')[2].partition('\n## ')[0].strip()
    print(f'\n{(output / "table.md").read_text(encoding="utf-8")}\n{findings}\n\nreport: {output / "report.md"}')


if __name__ == '__main__':
    from timm_spinal.cli import guard
    sys.exit(guard(main, sys.argv[1:]))
