"""What a run says and leaves for people and scripts: its plan and progress, and all files but those of weights."""
import csv
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import timm
import torch
from PIL import Image
from tqdm import tqdm

from timm_spinal.evaluation.figures import new_figure, save_figure
from timm_spinal.evaluation.metrics import TITLES, main_accuracy, same_answer_warning
from timm_spinal.files import write_atomically
from timm_spinal.version import __version__

from .config import to_yaml
from .distributed import on_main_process

if TYPE_CHECKING:
    from .distributed import Meter
    from .run import Run

FEW_UPDATES = 100
DRAW_SECONDS = 30  # between two drawings of the curves, which take as long as some epochs


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


def write_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw loss, the main accuracy and learning rate over the epochs, and a penalty where there is one."""
    name = main_accuracy((column for row in history for column in row), 'eval_')
    panels: tuple[tuple[str, tuple[str, ...]], ...] = (
        ('loss' if name == 'r2' else 'loss (nats)', ('train_loss', 'eval_loss', 'ema_loss')),
        (f'{TITLES[name]} (%)', (f'eval_{name}', f'ema_{name}')),
        ('learning rate', ('lr',)),
    )
    if any('train_ortho' in row for row in history):
        panels += (('orthogonality penalty', ('train_ortho',)),)
    width, height = 4. * len(panels), 3.5
    figure = new_figure(width, height, layout='none')
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.35 / height, wspace=0.25)
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels):
        for column in columns:
            points = [(row['epoch'], row[column]) for row in history if row.get(column) is not None]
            if points:
                axes.plot(*zip(*points), marker='.', label=column)
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
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
    return result_lines(result, folder, how_to_load(folder, register))


def how_to_load(folder: Path, register: str = '') -> str:
    """Code that loads the classifier of a run folder; ``register`` as in `final_lines`."""
    known = f' timm_spinal.ensure_registered({register!r});' if register else ''
    load = f'timm.create_model({"local-dir:" + str(folder)!r}, pretrained=True)'
    return f'import timm, timm_spinal;{known} model = {load}'


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


# ---- of a run ---------------------------------------------------------------------------------------------------


def plan_lines(run: 'Run') -> list[str]:
    """The plan of a run in one line, and a warning for each part of it with which a model hardly learns."""
    config, updates, epochs = run.config, run.updates_per_epoch, run.last_epoch
    processes, accum = run.accelerator.num_processes, run.accelerator.gradient_accumulation_steps
    batch = f'batch {config.batch_size}'
    batch += f' x {processes} processes' if processes > 1 else ''
    batch += f' x {accum} steps' if accum > 1 else ''
    warmup = 0 if run.scheduler is None else config.warmup_epochs
    parts = [
        f'{run.data.train_size} images', batch, f'{updates} updates an epoch', f'{epochs} epochs',
        f'{updates * epochs} updates in all', f'warm-up {round(warmup * updates)} updates',
        f'{_left_out(run)} images left out of each epoch',
    ]
    if run.task.frozen.epochs:
        parts.append(f'{min(run.task.frozen.epochs, epochs)} epochs of the head alone')
    lines = ['plan: ' + ', '.join(parts)]
    if 2 * warmup > epochs:
        lines.append(f'warning: {min(warmup, epochs):g} of {epochs} epochs are warm-up, in which the learning rate is '
                     f'still low; lower --warmup-epochs or raise --epochs')
    if updates * epochs < FEW_UPDATES:
        lines.append(f'warning: {updates * epochs} updates are few for a model to learn from; raise --epochs, lower '
                     f'--batch-size, or give --min-updates 300')
    return lines


def _left_out(run: 'Run') -> int:
    """Images that an epoch does not see: of a last batch that is not full, or by --epoch-repeats and --aug-repeats."""
    drawn = len(run.train_loader) * run.config.batch_size * run.accelerator.num_processes
    different = math.ceil(drawn / max(1., getattr(run.config, 'aug_repeats', 0.)))
    return max(0, run.data.train_size - different)


def write_first_files(run: 'Run') -> None:
    """Write the config and start the trackers; rows of epochs that will be done again go."""
    def write() -> None:
        write_text(run.folder / 'args.yaml', to_yaml(run.config))
        if run.progress.updates:
            write_table(run.folder / 'summary.csv', run.progress.history)
        print(f'run folder: {run.folder}', flush=True)

    on_main_process(run.accelerator, write)
    if run.config.log_with:
        run.accelerator.project_configuration.project_dir = str(run.folder)
        run.accelerator.project_configuration.logging_dir = str(run.folder)
        scalars = {k: v for k, v in asdict(run.config).items() if isinstance(v, (int, float, str, bool))}
        names = dict(trackio=dict(name=run.folder.name))  # else a name that trackio invents
        run.accelerator.init_trackers('timm_spinal', config=scalars, init_kwargs=names)


def progress_bar(run: 'Run') -> tqdm:
    """The bar of the current epoch, one step an update."""
    return tqdm(
        total=run.updates_per_epoch,
        initial=math.ceil(run.progress.batch / run.accelerator.gradient_accumulation_steps),
        desc=epoch_title(run.progress.epoch, run.last_epoch),
        leave=False,
        disable=None if run.accelerator.is_main_process else True,  # None: only on a terminal
    )


def log_progress(run: 'Run', bar: tqdm, meter: 'Meter', lr: float) -> None:
    """Move the bar by one update; every ``log_interval`` updates print losses and speed and feed the trackers.

    The meter must have been flushed where it prints.
    """
    bar.update()
    if run.progress.updates % run.config.log_interval:
        return
    progress = run.progress
    speed = progress.sums['images'] / progress.epoch_seconds
    values = {**{f'train/{k}': v for k, v in meter.last.items()}, 'lr': lr, 'images_per_second': speed}
    run.accelerator.log(values, step=progress.updates)
    text = f'training loss {meter.last["loss"]:.4f}, lr {lr:.3g}, {speed:.0f} images/s'
    bar.set_postfix_str(text)
    if bar.disable and run.accelerator.is_main_process:
        print(f'{epoch_title(progress.epoch, run.last_epoch)}, update {progress.updates}: {text}', flush=True)


def log_epoch(run: 'Run', drawn_at: float) -> float:
    """Rewrite summary.csv and, now and then, curves.png; print the line of the epoch and feed the trackers.

    Args:
        run: The run.
        drawn_at: When the curves were drawn, by `time.monotonic`.

    Returns:
        When they have been drawn by now.
    """
    history, now = run.progress.history, time.monotonic()
    draw = now - drawn_at > DRAW_SECONDS
    row = history[-1]
    run.accelerator.log({k: v for k, v in row.items() if k != 'epoch'}, step=run.progress.updates)

    def write() -> None:
        write_table(run.folder / 'summary.csv', history)
        if draw:
            write_curves(run.folder / 'curves.png', history)
        print(epoch_line(row, run.last_epoch), flush=True)

    on_main_process(run.accelerator, write)
    return now if draw else drawn_at


def _log_to_tensorboard(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.writer.add_image(name, np.asarray(image), step, dataformats='HWC')


def _log_to_trackio(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    import trackio
    tracker.run.log({name: trackio.Image(image)}, step)


def _log_images(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: [image]}, step)


# trackers of Accelerate that take pictures
PICTURE_LOGGERS: dict[str, Callable[[Any, str, Image.Image, int], None]] = {
    'tensorboard': _log_to_tensorboard, 'trackio': _log_to_trackio, 'wandb': _log_images, 'swanlab': _log_images,
}


def log_pictures(run: 'Run', files: list[Path]) -> None:
    """Pass pictures of the run folder on to the trackers that take pictures. Every process calls it."""
    for tracker in run.accelerator.trackers if files else []:
        log = PICTURE_LOGGERS.get(tracker.name)
        if log is not None and run.accelerator.is_main_process:
            for file in files:
                with Image.open(file) as image:
                    log(tracker, file.stem, image.convert('RGB'), run.progress.updates)


def write_last_files(run: 'Run', result: dict[str, Any]) -> None:
    """Write curves.png and result.json, and print the last lines of a run. For the main process."""
    write_curves(run.folder / 'curves.png', run.progress.history)
    write_result(run.folder / 'result.json', result)
    lines = result_lines(result, run.folder, run.problem.how_to_load(run))
    warning = same_answer_warning('the model', result['same_answer'], run.data.class_names)
    for line in (*lines[:-1], *warning, lines[-1]):
        print(line, flush=True)
