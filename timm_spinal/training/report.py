"""What a run leaves for people and scripts: args.yaml, summary.csv, curves.png, result.json and the last lines."""
import csv
import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch

from timm_spinal.evaluation.metrics import TITLES, main_accuracy
from timm_spinal.files import write_atomically
from timm_spinal.version import __version__


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    def write(temp: Path) -> None:
        temp.write_text(text, encoding='utf-8')

    write_atomically(path, write)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; a column that a row does not have stays empty there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(temp: Path) -> None:
        with open(temp, 'w', newline='', encoding='utf-8') as f:
            table = csv.DictWriter(f, columns)
            table.writeheader()
            table.writerows(rows)

    write_atomically(path, write)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG in one step."""
    write_atomically(path, lambda p: figure.savefig(p, format='png', dpi=dpi))


def write_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw loss, the main accuracy and learning rate over the epochs, and a penalty where there is one."""
    name = main_accuracy((column for row in history for column in row), 'eval_')
    panels: tuple[tuple[str, tuple[str, ...]], ...] = (
        ('loss (nats)', ('train_loss', 'eval_loss', 'ema_loss')),
        (f'{TITLES[name]} (%)', (f'eval_{name}', f'ema_{name}')),
        ('learning rate', ('lr',)),
    )
    if any('train_ortho' in row for row in history):
        panels += (('orthogonality penalty', ('train_ortho',)),)
    figure = new_figure(4 * len(panels), 3.5)
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels):
        for column in columns:
            points = [(row['epoch'], row[column]) for row in history if row.get(column) is not None]
            if points:
                axes.plot(*zip(*points), marker='.', label=column)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_figure(figure, path, dpi=100)


def hardware(device: torch.device, processes: int) -> str:
    """One line on what a run ran on."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    threads = f', {torch.get_num_threads()} threads' if device.type == 'cpu' else ''
    return f'{processes} x {device.type} ({name}{threads})'


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import accelerate
    return dict(
        timm_spinal=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        accelerate=accelerate.__version__,
        python=platform.python_version(),
    )


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write result.json."""
    write_text(path, json.dumps(result, indent=2) + '\n')


def epochs_done(result: dict[str, Any]) -> int | None:
    """The number of epochs of a run from its result.json, where older runs have it as ``epoch``."""
    return result.get('epochs', result.get('epoch'))


def accuracy_text(metrics: dict[str, Any], digits: int = 2) -> str:
    """The accuracies among some metrics, for people."""
    return ', '.join(f'{title} {metrics[name]:.{digits}f} %' for name, title in TITLES.items()
                     if metrics.get(name) is not None)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """What is printed after an epoch."""
    parts = [f'training loss {row["train_loss"]:.4f}']
    name = main_accuracy(row, 'eval_')
    for prefix, title in (('eval_', 'validation'), ('ema_', 'validation of EMA')):
        if prefix + name in row:
            parts.append(f'{title} {TITLES[name]} {row[prefix + name]:.2f} %' + _loss_text(row, f'{prefix}loss'))
    parts.append(f'lr {row["lr"]:.3g}, {row["images_per_second"]:.0f} images/s')
    return f'{epoch_title(row["epoch"], epochs)}: {"; ".join(parts)}'


def epoch_title(epoch: int, epochs: int) -> str:
    """An epoch's number, counted from 0 as in timm, and how far a run of so many epochs is with it."""
    return f'epoch {epoch} ({epoch + 1} of {epochs})'


def _loss_text(metrics: dict[str, Any], name: str) -> str:
    return f', loss {metrics[name]:.4f}' if name in metrics else ''


def final_lines(result: dict[str, Any], folder: Path, register: str = '') -> list[str]:
    """What is printed at the end of a run; the last line loads the model back.

    Args:
        result: The content of result.json.
        folder: The run folder.
        register: Name of the architecture, when importing timm_spinal does not register it.
    """
    known = f' timm_spinal.ensure_registered({register!r});' if register else ''
    load = f'timm.create_model({"local-dir:" + str(folder)!r}, pretrained=True)'
    return result_lines(result, folder, f'import timm, timm_spinal;{known} model = {load}')


def result_lines(result: dict[str, Any], folder: Path, load: str) -> list[str]:
    """The same with the code that loads the weights given; ``result`` may be without losses."""
    lines = []
    name = main_accuracy(result)
    if result[name] is not None:
        best = f'epoch {result["best_epoch"]}' + (' (EMA)' if result['best_weights'] == 'ema' else '')
        lines.append(f'validation {accuracy_text(result)}{_loss_text(result, "loss")} of {best}')
    if result.get(f'test_{name}') is not None:
        text = accuracy_text({name: result[f'test_{name}'] for name in TITLES if f'test_{name}' in result})
        lines.append(f'test {text}{_loss_text(result, "test_loss")} (once, {result.get("keep", "best")} weights)')
    if result['skipped']:
        lines.append(f'{result["skipped"]} unreadable images skipped')
    lines.append(f'{result["seconds"]:.1f} s, {result["images_per_second"]:.0f} images/s, results in {folder}')
    if result[name] is None:
        return [*lines, 'no finite evaluation, so no weights were written']
    return [*lines, f'load it: {load}']
