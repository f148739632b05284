"""Plot the curves of several runs in one picture, and print how long each took to reach an accuracy.

    timm-spinal plot output/train/plain output/train/wld --to-accuracy 85
    timm-spinal plot output/compare/cifar10_ic_wld --output wld.png

A RUN is the folder of a run (one curve), a folder of seed-* runs (one curve, with a band from the lowest to the
highest) or the folder of a sweep (a curve for each variant). Accuracy is top-1 on the validation data in
percent (exact pairs where images have two classes), of the better one of model and moving average; time is that of
training and evaluation.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from timm_spinal.arguments import Parser
from timm_spinal.errors import UserError
from timm_spinal.evaluation.figures import new_figure, save_figure
from timm_spinal.evaluation.metrics import MAIN, TITLES, main_accuracy
from timm_spinal.training.parser import check_output_file

from .runs import SUMMARY, read_comparison, read_history, read_result, run_folder

NONE = '-'


@dataclass
class LearningCurve:
    """One run: evaluated epochs counted from 0, seconds up to their end (nan where not known), accuracy in percent."""
    epochs: np.ndarray
    seconds: np.ndarray
    accuracy: np.ndarray
    test_accuracy: float | None
    metric: str

    def reaches(self, accuracy: float) -> tuple[float, float] | None:
        """Number of epochs and seconds that it took to this accuracy; None where it was not reached."""
        indices = np.flatnonzero(self.accuracy >= accuracy)
        return (float(self.epochs[indices[0]] + 1), float(self.seconds[indices[0]])) if len(indices) else None


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal plot``; returns the exit code.

    Raises:
        UserError: A folder that holds no run, or an accuracy that is none.
    """
    parser = Parser('timm-spinal plot', __doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, of seed-* runs or of a comparison')
    parser.add_argument('--to-accuracy', type=float, action='append', metavar='A',
                        help='accuracy in percent, can be repeated; not given: the mean best of the first curve')
    parser.add_argument('--output', default='plot.png', metavar='PNG', help='the picture (default: plot.png)')
    args = parser.parse_args(argv)
    check_output_file(args.output, '--output', ('.png',))
    for accuracy in args.to_accuracy or []:
        if not 1 < accuracy <= 100:
            raise UserError(f'--to-accuracy {accuracy:g}: give percent, above 1 and up to 100')
    curves = read_curves([Path(run) for run in args.runs])
    accuracies = args.to_accuracy or [_best(next(iter(curves.values()))).mean()]
    draw(Path(args.output), curves, accuracies)
    print(table(curves, accuracies))
    print(f'\npicture: {args.output}')
    return 0


def read_curves(folders: Sequence[Path]) -> dict[str, list[LearningCurve]]:
    """The runs of some folders, by the name of their curve.

    Raises:
        UserError: A folder that holds no run, a run without evaluation, the same folder twice, or accuracies of two
            kinds.
    """
    runs_by_name: dict[str, list[Path]] = {}
    for folder in folders:
        for name, runs in _runs_in(folder).items():
            while name in runs_by_name:
                if runs_by_name[name] == runs:
                    raise UserError(f'{folder}: it is given twice; remove one')
                name = f'{runs[0].absolute().parent.name}/{name}'
            runs_by_name[name] = runs
    curves = {name: [read_learning_curve(run) for run in runs] for name, runs in runs_by_name.items()}
    kinds = {c.metric: name for name, courses in curves.items() for c in courses}
    if len(kinds) > 1:
        (a, one), (b, other) = list(kinds.items())[:2]
        raise UserError(f'{one} has {TITLES[a]} and {other} has {TITLES[b]}; plot them separately')
    return curves


def _runs_in(folder: Path) -> dict[str, list[Path]]:
    if (folder / SUMMARY).is_file():
        return {folder.absolute().name: [folder]}
    comparison = read_comparison(folder) if folder.is_dir() else None
    if comparison is None:
        runs = {folder.absolute().name: sorted(folder.glob('seed-*'), key=lambda p: (len(p.name), p.name))}
    elif comparison.folders:
        runs = {v: [Path(p) for p in comparison.folders[v].values()] for v in comparison.variants}
    else:
        runs = {v: [run_folder(folder, v, seed) for seed in comparison.seeds] for v in comparison.variants}
    done = {name: [p for p in paths if (p / SUMMARY).is_file()] for name, paths in runs.items()}
    if not any(done.values()):
        raise UserError(f'{folder}: it contains no run (no {SUMMARY}); give the folder of a run or of a comparison')
    return {name: paths for name, paths in done.items() if paths}


def read_learning_curve(folder: Path) -> LearningCurve:
    """The learning curve of one run.

    Raises:
        UserError: No epoch was evaluated, or a file is damaged.
    """
    history = read_history(folder)
    metric = main_accuracy((column for row in history for column in row), 'eval_')
    rows = [row for row in history if f'eval_{metric}' in row]
    if not rows:
        raise UserError(f'{folder}: no epoch was evaluated yet; leave it out')
    return LearningCurve(
        np.array([row['epoch'] for row in rows]),
        np.array([row.get('seconds', np.nan) for row in rows]),
        np.array([max(row[f'eval_{metric}'], row.get(f'ema_{metric}', 0.)) for row in rows]),
        (read_result(folder) or {}).get(f'test_{metric}'),
        metric,
    )


def table(curves: dict[str, list[LearningCurve]], accuracies: Sequence[float]) -> str:
    """A table in Markdown: mean and standard deviation over runs; epochs and seconds over those that got there."""
    title = _title(curves)
    head = ['run', 'n', f'best {title}', f'test {title}']
    head += [f'{what} to {accuracy:.2f} %' for accuracy in accuracies for what in ('epochs', 'seconds')]
    lines = [head, ['---'] * len(head)]
    for name, courses in curves.items():
        tests = [c.test_accuracy for c in courses if c.test_accuracy is not None]
        cells = [name, str(len(courses)), _spread(_best(courses), 2), _spread(tests, 2)]
        for accuracy in accuracies:
            reached = [point for c in courses if (point := c.reaches(accuracy))]
            share = f' ({len(reached)} of {len(courses)})' if len(reached) < len(courses) else ''
            cells += [_spread([point[i] for point in reached], 1) + share if reached else 'not reached' for i in (0, 1)]
        lines.append(cells)
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _title(curves: dict[str, list[LearningCurve]]) -> str:
    return TITLES[next((c.metric for courses in curves.values() for c in courses), MAIN[0])]


def _best(courses: list[LearningCurve]) -> np.ndarray:
    return np.array([c.accuracy.max() for c in courses])


def _spread(values: Sequence[float] | np.ndarray, digits: int) -> str:
    if not len(values) or np.isnan(values).any():
        return NONE
    mean = f'{np.mean(values):.{digits}f}'
    return f'{mean} +- {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else mean


def draw(path: Path, curves: dict[str, list[LearningCurve]], accuracies: Sequence[float]) -> None:
    """Accuracy over epochs and over seconds: the mean of each curve's runs, and a band from lowest to highest."""
    figure = new_figure(12, 4.5)
    panels = dict(epochs='epoch', seconds='seconds')
    for axes, label in zip(figure.subplots(1, 2, sharey=True), panels):
        for i, (name, courses) in enumerate(curves.items()):
            length = min(len(c.accuracy) for c in courses)
            x = np.mean([getattr(c, label)[:length] for c in courses], axis=0)
            y = np.array([c.accuracy[:length] for c in courses])
            axes.plot(x, y.mean(0), marker='.', color=f'C{i % 10}', label=name)
            axes.fill_between(x, y.min(0), y.max(0), color=f'C{i % 10}', alpha=0.15, linewidth=0)
        for accuracy in accuracies:
            axes.axhline(accuracy, color='grey', linestyle='--', linewidth=1)
        axes.set(xlabel=panels[label], ylabel=f'validation {_title(curves)} (%)')
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
