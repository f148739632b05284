"""Pictures of the report of a comparison. Not in plot.py, which works without SciPy."""
from pathlib import Path

import numpy as np

from timm_spinal.evaluation.figures import new_figure, save_figure
from timm_spinal.evaluation.metrics import TITLES, main_accuracy

from .runs import METRICS, RunResult, read_history
from .statistics import Values, estimate


def draw_accuracy(path: Path, values: dict[str, Values], params: dict[str, int], metric: str) -> None:
    """A point for each seed, the mean and its 95 % interval, against the number of parameters."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for i, (variant, by_seed) in enumerate(values.items()):
        x, points = params.get(variant) or 1, list(by_seed.values())
        mean, color = estimate(points), f'C{i % 10}'
        axes.plot([x] * len(points), points, '.', color=color, alpha=0.4)
        error = None if mean.half is None else [[mean.half], [mean.half]]
        axes.errorbar([x], [mean.mean], yerr=error, fmt='o', capsize=5, color=color, label=variant)
    axes.set(xscale='log', xlabel='parameters', ylabel=f'{METRICS[metric]} (%)',
             title='points: seeds; bars: mean and 95 % interval over seeds')
    axes.grid(alpha=0.3)
    if values:
        axes.legend()
    save_figure(figure, path)


def draw_curves(path: Path, rows: list[RunResult]) -> None:
    """Training loss and validation accuracy over the epochs: mean over seeds, band from lowest to highest."""
    figure = new_figure(12, 4.5)
    variants = list(dict.fromkeys(row.variant for row in rows))
    histories = {v: [read_history(Path(r.folder)) for r in rows if r.variant == v] for v in variants}
    name = main_accuracy((c for of_variant in histories.values() for h in of_variant for r in h for c in r), 'eval_')
    panels = (('train_loss', 'training loss (nats)'), (f'eval_{name}', f'validation {TITLES[name]} (%)'))
    for axes, (column, title) in zip(figure.subplots(1, len(panels)), panels):
        for i, variant in enumerate(variants):
            lines = [[(r['epoch'], r[column]) for r in history if column in r] for history in histories[variant]]
            lines = [line for line in lines if line]
            if not lines:
                continue
            length = min(map(len, lines))
            epochs = [x for x, _ in lines[0][:length]]
            y = np.array([[v for _, v in line[:length]] for line in lines])
            axes.plot(epochs, y.mean(0), color=f'C{i % 10}', label=variant)
            axes.fill_between(epochs, y.min(0), y.max(0), color=f'C{i % 10}', alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save_figure(figure, path)
