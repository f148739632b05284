"""Whole trainings, variants times seeds, each an ordinary run folder of the trainer."""
import dataclasses
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, load_yaml
from timm_spinal.training.identity import changed_settings
from timm_spinal.training.model import create_model
from timm_spinal.training.report import write_text
from timm_spinal.training.transforms import resolve_data

from .controls import slug
from .cost import network_cost
from .report import write_report
from .runs import ERROR, RESULT, Comparison, read_row, run_folder, write_comparison
from .splits import Splits, open_splits, three_way
from .sweep_file import Sweep, size_control, write_config
from .tune import FIRST_SEED, mark_best

# settings of which a finished run may have had others
_ASIDE = ('resume', 'output', 'experiment', 'workers', 'pin_mem', 'debug', 'log_interval', 'log_with',
          'checkpoint_steps', 'checkpoint_hist', 'validation_batch_size', 'dataset_download')


@dataclass(frozen=True)
class Task:
    """One training: its config names its folder."""
    variant: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.experiment

    @property
    def title(self) -> str:
        return f'{self.variant}, {self.config.experiment}'


def run_sweep(sweep: Sweep, jobs: int, command: str) -> tuple[Path, int]:
    """Train what is not finished and write the report.

    Args:
        sweep: From `read_sweep`.
        jobs: Trainings at a time, each in a process of its own.
        command: The command line, for the report.

    Returns:
        Folder of the comparison and number of runs that failed.

    Raises:
        UserError: Data or a variant that cannot work, or a folder of a run with other settings: before anything runs.
    """
    configs, splits = _prepare(sweep)
    comparison = Comparison(
        'sweep', command, list(configs), sweep.control, sweep.seeds, sized_as=sweep.sized_as,
        data=dict(name=splits.train.name, train_size=len(splits.train), validation_size=len(splits.validation),
                  test_size=len(splits.test), num_classes=splits.num_classes, class_names=splits.class_names,
                  split=splits.note),
        setting=_describe(configs))
    tuning = {name: [_tune_task(sweep, name, config, i) for i in range(len(sweep.grid))]
              for name, config in configs.items()}
    _check_folders([task for tasks in tuning.values() for task in tasks])
    if not sweep.grid:
        _check_folders(_tasks(sweep, configs))
    sweep.output.mkdir(parents=True, exist_ok=True)
    if sweep.grid:
        run_tasks([task for tasks in tuning.values() for task in tasks], jobs)
        for name, tasks in tuning.items():
            configs[name], comparison.tuned[name] = _choose(name, configs[name], sweep.grid, tasks)
    tasks = _tasks(sweep, configs)
    _check_folders(tasks)
    write_comparison(sweep.output, comparison)
    failed = run_tasks(tasks, jobs)
    for name, config in configs.items():
        comparison.costs[name] = _cost(config, splits.num_classes)
    write_comparison(sweep.output, comparison)
    write_report(sweep.output, comparison)
    return sweep.output, failed


def run_tasks(tasks: list[Task], jobs: int) -> int:
    """Run what is not finished, some at a time; a failure is told and the others go on. Returns the failures."""
    todo = [task for task in tasks if not is_finished(task)]
    if len(todo) < len(tasks):
        print(f'{len(tasks) - len(todo)} of {len(tasks)} runs are finished already', flush=True)
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(jobs):
        slots.put(slot)
    running: set[subprocess.Popen] = set()
    pool, failed = ThreadPoolExecutor(jobs), 0
    try:
        futures = {pool.submit(_run, task, slots, jobs, running): task for task in todo}
        for count, future in enumerate(as_completed(futures), 1):
            error, seconds = future.result()
            failed += bool(error)
            print(f'[{count}/{len(todo)}] {futures[future].title}: {error or "done"}, {seconds:.0f} s', flush=True)
    except BaseException:
        # trainings write a checkpoint when they are asked to stop
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True)
    return failed


def is_finished(task: Task) -> bool:
    """Whether a run folder holds a result; `check_folder` has seen that it is of these settings."""
    return (task.folder / RESULT).exists() and not (task.folder / ERROR).exists()


def check_folder(task: Task) -> None:
    """Refuse a run folder of other settings.

    Raises:
        UserError: Names the settings.
    """
    path = task.folder / 'args.yaml'
    if not path.exists():
        return
    saved, now = {**vars(TrainConfig()), **load_yaml(path)}, vars(task.config)
    if now['num_classes'] is None:  # the run has written what it found
        saved['num_classes'] = None
    changed = {k: v for k, v in changed_settings(saved, now).items() if k not in _ASIDE}
    if changed:
        text = ', '.join(f'{k} ({v})' for k, v in changed.items())
        raise UserError(f'run folder {task.folder}: was made with other settings: {text}; remove it, or give the sweep '
                        f'another output')


def job_environment(slot: int, jobs: int, devices: int) -> dict[str, str]:
    """Environment of one of several trainings at a time: its share of the cores, and a GPU of its own."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
        if devices > 1 and 'CUDA_VISIBLE_DEVICES' not in environment:
            environment['CUDA_VISIBLE_DEVICES'] = str(slot % devices)
    return environment


def _run(task: Task, slots: 'queue.Queue[int]', jobs: int, running: set) -> tuple[str, float]:
    """Train in a process of its own; returns why it failed, or '', and the seconds."""
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / ERROR).unlink(missing_ok=True)
    start, log = time.perf_counter(), task.folder.with_suffix('.log')
    config_file = task.folder.with_suffix('.yaml')
    write_config(config_file, task.config)
    slot = slots.get()
    try:
        with open(log, 'a', encoding='utf-8') as out:
            process = subprocess.Popen(
                [sys.executable, '-m', 'timm_spinal.train', '--config', str(config_file)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=job_environment(slot, jobs, torch.cuda.device_count()))
            running.add(process)
            code = process.wait()
            running.discard(process)
    finally:
        slots.put(slot)
    error = ''
    if code or not (task.folder / RESULT).exists():
        error = f'failed: {_last_error(log) or f"exit code {code}"} (see {log})'
        write_text(task.folder / ERROR, error)
    return error, time.perf_counter() - start


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
    errors = [line.partition('error: ')[2] for line in lines if line.startswith('error: ')]
    return (errors or lines or [''])[-1][:300]


# ---- what is run ------------------------------------------------------------------------------------------------


def _prepare(sweep: Sweep) -> tuple[dict[str, TrainConfig], Splits]:
    """Configs with three splits and sized controls, and the splits of the first variant."""
    configs, opened = {}, None
    for name in sweep.configs:
        config, _ = three_way(sweep.configs[name])
        if not config.test_split:
            raise UserError(f'variant {name}: the data have no test split, which whole trainings need; make a folder '
                            f'test/, or name one with test_split')
        if opened is None:
            opened = open_splits(config)
        sized = size_control(sweep, name, opened.num_classes)
        configs[name] = replace(config, model_kwargs=sized.model_kwargs)
    assert opened is not None
    if any(config.val_split_fraction for config in configs.values()):
        opened.note += ' The validation images are cut anew by each seed, the same for every variant.'
    return configs, opened


def _tasks(sweep: Sweep, configs: dict[str, TrainConfig]) -> list[Task]:
    tasks = []
    for seed in sweep.seeds:  # seed by seed, so that an unfinished sweep has pairs to compare
        for name, config in configs.items():
            folder = run_folder(sweep.output, name, seed)
            tasks.append(Task(name, replace(
                config, seed=seed, output=str(folder.parent), experiment=folder.name, resume='auto')))
    return tasks


def _tune_task(sweep: Sweep, name: str, config: TrainConfig, point: int) -> Task:
    folder = sweep.output / 'tune' / slug(name)
    # no test split: nothing is chosen by it
    return Task(name, replace(
        config, **sweep.grid[point], seed=FIRST_SEED, test_split='', output=str(folder), experiment=f'point-{point}',
        resume='auto'))


def _check_folders(tasks: list[Task]) -> None:
    for task in tasks:
        check_folder(task)


def _choose(
        name: str,
        config: TrainConfig,
        grid: list[dict[str, Any]],
        tasks: list[Task],
) -> tuple[TrainConfig, list[dict[str, Any]]]:
    points = [dict(change, val_top1=read_row(task.folder, name, FIRST_SEED).val_top1, chosen=False)
              for change, task in zip(grid, tasks)]
    return replace(config, **grid[mark_best(name, points)]), points


def _cost(config: TrainConfig, num_classes: int) -> dict[str, Any]:
    plain = replace(config, pretrained=False, pretrained_path=None, initial_checkpoint='')
    model = create_model(plain, num_classes).eval()
    device = PartialState().device
    image = torch.zeros(1, *resolve_data(config, model)['input_size'], device=device)
    return asdict(network_cost(model.to(device), image))


def _describe(configs: dict[str, TrainConfig]) -> dict[str, Any]:
    default = asdict(TrainConfig())
    values = {name: asdict(config) for name, config in configs.items()}
    first = next(iter(values.values()))
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    common = {k: first[k] for k in names if all(v[k] == first[k] for v in values.values())}
    lines = {'Shared options': _text({k: v for k, v in common.items() if v != default[k]})}
    for name, value in values.items():
        lines[f'`{name}`'] = _text({k: v for k, v in value.items() if k not in common})
    return lines


def _text(options: dict[str, Any]) -> str:
    return ', '.join(f'{k} {v}' for k, v in options.items()) or 'none'
