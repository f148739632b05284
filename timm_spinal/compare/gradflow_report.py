"""Report of `gradflow`: table, picture and a summary in words."""
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from timm_spinal.evaluation.figures import new_figure, save_figure
from timm_spinal.files import read_table
from timm_spinal.training.report import write_table, write_text

from .runs import read_result


class GradientRecord(NamedTuple):
    """Gradient of one basis at one update of one arm.

    Attributes:
        arm: Name of the run folder.
        update: Updates done before.
        epoch: Epochs done, with their fraction.
        basis: Name of the tensor.
        mean: Mean |dL/dB|, L without the penalty.
        max: Greatest |dL/dB|.
        row_norm: Mean norm of the basis's filters.
    """
    arm: str
    update: int
    epoch: float
    basis: str
    mean: float
    max: float
    row_norm: float


# a BatchNorm follows each basis, so filters of twice the norm get half the gradient and the same effect; the product
# of both does not depend on it
PANELS: dict[str, Callable[[GradientRecord], float]] = {
    'mean |dL/dB|': lambda row: row.mean,
    'max |dL/dB|': lambda row: row.max,
    'mean |dL/dB| x norm of a filter': lambda row: row.mean * row.row_norm,
}


def read_records(path: Path) -> list[GradientRecord]:
    """Records as `write_table` wrote them; none where there is no file."""
    if not path.exists():
        return []
    texts = ('arm', 'basis')
    rows = [GradientRecord(**{k: row[k] for k in GradientRecord._fields})
            for row in read_table(path, GradientRecord._fields, texts)]
    return [row._replace(update=int(row.update)) for row in rows]


def write_gradients(output: Path, rows: Sequence[GradientRecord], config: Any) -> None:
    """Write gradients.csv, gradients.png and report.md.

    Args:
        output: Folder with a run folder for each arm.
        rows: Records of two arms, the one without the penalty first.
        config: The options of the run, for the report.
    """
    write_table(output / 'gradients.csv', [row._asdict() for row in rows])
    draw_gradients(output / 'gradients.png', rows)
    results = {arm: read_result(output / arm) or {} for arm in dict.fromkeys(row.arm for row in rows)}
    write_text(output / 'report.md', report(rows, results, config))


def draw_gradients(path: Path, rows: Sequence[GradientRecord]) -> None:
    """A column of panels for each basis, a line for each arm: every record, and the median of eleven."""
    bases, arms = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ('basis', 'arm'))
    figure = new_figure(1.5 + 3.2 * len(bases), 2.6 * len(PANELS))
    grid = figure.subplots(len(PANELS), len(bases), sharex=True, sharey='row', squeeze=False)
    for line, (title, value) in zip(grid, PANELS.items()):
        for axes, basis in zip(line, bases):
            for i, arm in enumerate(arms):
                records = [row for row in rows if (row.arm, row.basis) == (arm, basis)]
                x, y = [row.epoch for row in records], [value(row) for row in records]
                axes.plot(x, y, color=f'C{i}', alpha=0.25, linewidth=0.8)
                axes.plot(x, smooth(y), color=f'C{i}', label=arm.replace('_', ' '))
            axes.set_yscale('log')
            axes.grid(alpha=0.3)
        line[0].set_ylabel(title)
    for axes, basis in zip(grid[0], bases):
        axes.set_title(basis)
    for axes in grid[-1]:
        axes.set_xlabel('epoch')
    grid[0][-1].legend()
    save_figure(figure, path, dpi=90)


def smooth(values: Sequence[float], width: int = 11) -> np.ndarray:
    """The median of so many neighbours, of fewer at the ends."""
    half = width // 2
    return np.array([np.median(values[max(0, i - half):i + half + 1]) for i in range(len(values))])


def medians(rows: Sequence[GradientRecord], arm: str, value: Callable[[GradientRecord], float]) -> dict[str, float]:
    """Of each basis, the median over the records of an arm."""
    bases = dict.fromkeys(row.basis for row in rows)
    return {b: float(np.median([value(row) for row in rows if (row.arm, row.basis) == (arm, b)])) for b in bases}


def report(rows: Sequence[GradientRecord], results: dict[str, dict[str, Any]], config: Any) -> str:
    """report.md: medians over the records of both arms, and what they say.

    Args:
        rows: Records, the arm without the penalty first.
        results: ``result.json`` of each arm.
        config: The options of the run.
    """
    without, with_ = dict.fromkeys(row.arm for row in rows)
    times = len({row.update for row in rows})
    titles = [title.replace('|', r'\|') for title in PANELS]
    lines = [
        '# Gradient of the shared filters', '',
        f'`{config.model}`, epochs: {config.epochs}, seed {config.seed}, penalty {config.sb_ortho:g} '
        f'({config.sb_ortho_mode}); gradient of the loss without the penalty in both; medians of {times} records.', '',
        '| basis | ' + ' | '.join(f'{title}, without | with | ratio' for title in titles) + ' |',
        '|' + ' --- |' * (1 + 3 * len(PANELS))]
    pairs = {title: (medians(rows, without, v), medians(rows, with_, v)) for title, v in PANELS.items()}
    for basis in next(iter(pairs.values()))[0]:
        cells = [f'{a[basis]:.2e} | {b[basis]:.2e} | {ratio(a, b, basis):.2f}' for a, b in pairs.values()]
        lines.append(f'| {basis} | ' + ' | '.join(cells) + ' |')
    lines.append('')
    lines += [f'- {sentence(title, *pair)}' for title, pair in pairs.items()]
    norms = [medians(rows, arm, lambda row: row.row_norm) for arm in (without, with_)]
    lines.append('- Mean norm of a filter, without and with the penalty: ' + ', '.join(
        f'{basis} {norms[0][basis]:.2f} and {norms[1][basis]:.2f}' for basis in norms[0]) + '.')
    tops = {arm.replace('_', ' '): result.get('top1') for arm, result in results.items()}
    lines += [f'- Validation top-1 {arm}: {top:.2f} %.' for arm, top in tops.items() if top is not None]
    return '\n'.join([*lines, '- One seed: what differs between the arms may be chance.', ''])


def ratio(without: dict[str, float], with_: dict[str, float], basis: str) -> float:
    """With the penalty over without; nan where there is no gradient."""
    return with_[basis] / without[basis] if without[basis] else float('nan')


def sentence(title: str, without: dict[str, float], with_: dict[str, float]) -> str:
    """Which arm has the greater values, and how evenly the bases of each share them."""
    ratios = [ratio(without, with_, basis) for basis in without]
    greater = sum(r > 1. for r in ratios)
    text = (f'{title}: greater with the penalty in {greater} of {len(ratios)} bases '
            f'({min(ratios):.2f} to {max(ratios):.2f} times).')
    if len(ratios) > 1 and min(without.values()) and min(with_.values()):
        spread = [max(arm.values()) / min(arm.values()) for arm in (without, with_)]
        text += f' From the smallest to the greatest basis it differs {spread[0]:.1f} times without and {spread[1]:.1f}'
        text += ' times with it.'
    return text
