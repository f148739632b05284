"""Whole trainings, variants times seeds, each an ordinary run folder of the trainer."""
import dataclasses
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from timm_spinal.errors import UserError
from timm_spinal.training.checkpoint import find_checkpoints, read_state
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.model import create_model
from timm_spinal.training.options import option_names
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.resume_checks import changed_settings, with_defaults
from timm_spinal.training.run_dir import FolderLock
from timm_spinal.training.splits import describe_splits
from timm_spinal.training.transforms import resolve_data

from .controls import slug
from .cost import network_cost
from .head_experiment import FIRST_SEED, mark_best
from .jobs import Task, run_tasks
from .report import write_report
from .runs import Comparison, read_run_result, run_folder, write_comparison
from .splits import Splits, open_splits, three_way
from .sweep_file import Sweep, size_control, teacher_of


def run_sweep(
        sweep: Sweep,
        jobs: int,
        command: str,
        per_class: bool = False,
        calibration: bool = False,
) -> tuple[Path, int]:
    """Train what is not finished and write the report.

    Args:
        sweep: From `read_sweep`.
        jobs: Trainings at a time, each in a process of its own.
        command: The command line, for the report.
        per_class: Write ``per_class.csv`` too.
        calibration: Draw ``calibration.png`` too.

    Returns:
        Folder of the comparison and number of runs that failed.

    Raises:
        UserError: Data or a variant that cannot work, a folder of a run with other settings, or one in which another
            process runs: before anything runs.
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
    with FolderLock(sweep.output):
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
        write_report(sweep.output, comparison, per_class, calibration)
    return sweep.output, failed


def check_folder(task: Task) -> None:
    """Refuse a run folder of other settings.

    Raises:
        UserError: Names the settings.
    """
    path = task.folder / 'args.yaml'
    if not path.exists():
        return
    saved, now = with_defaults(load_yaml(path)), vars(task.config)
    if now['num_classes'] is None:  # the run has written what it found
        saved['num_classes'] = None
    # the training process reads the same variable of the environment
    precision = now['mixed_precision'] or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    now, saved = dict(now, mixed_precision=precision), dict(saved, mixed_precision=saved['mixed_precision'] or 'no')
    trained = option_names(TrainConfig, changes_result=True)
    changed = {k: v for k, v in changed_settings(saved, now, _cwd(task.folder)).items() if k in trained}
    if changed:
        text = ', '.join(f'{k} ({v})' for k, v in changed.items())
        raise UserError(f'run folder {task.folder}: was made with other settings: {text}; remove it, or give the sweep '
                        f'another output')


def _cwd(folder: Path) -> str:
    """Working folder of a run, '' where it is not known."""
    try:
        return next((read_state(path).get('cwd', '') for path in find_checkpoints(folder / 'last')), '')
    except (OSError, ValueError):  # a damaged checkpoint, which resuming tells of
        return ''


# ---- what is run ------------------------------------------------------------------------------------------------


def _prepare(sweep: Sweep) -> tuple[dict[str, TrainConfig], Splits]:
    """Configs with three splits and sized controls, and the splits of the first variant."""
    configs, opened = {}, None
    for name in sweep.configs:
        config, _ = three_way(sweep.configs[name])
        if not config.test_split:
            raise UserError(f'variant {name}: the data have no test split, which a sweep needs; make a folder test/, '
                            'or name one with test_split')
        if opened is None:
            opened = open_splits(config)
        sized = size_control(sweep, name, opened.num_classes)
        configs[name] = replace(config, model_kwargs=sized.model_kwargs)
    assert opened is not None
    print(describe_splits(opened.named()), flush=True)
    if any(config.val_split_fraction for config in configs.values()):
        opened.note += ' Each seed has other validation images, the same for every variant.'
    return configs, opened


def _tasks(sweep: Sweep, configs: dict[str, TrainConfig]) -> list[Task]:
    tasks = []
    for seed in sweep.seeds:  # seed by seed, so that an unfinished sweep has pairs to compare
        for name, config in configs.items():
            folder = run_folder(sweep.output, name, seed)
            teacher = run_folder(sweep.output, teacher_of(config), seed) if teacher_of(config) else None
            config = replace(config, kd_model_name=str(teacher) if teacher else config.kd_model_name)
            tasks.append(Task(name, replace(
                config, seed=seed, output=str(folder.parent), experiment=folder.name, resume='auto'), teacher))
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
    rows = [read_run_result(task.folder, name, FIRST_SEED) for task in tasks]
    points = [dict(change, val_top1=row.val_top1 if row.val_exact is None else row.val_exact, chosen=False)
              for change, row in zip(grid, rows)]
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
