"""Results of a run beside those of other runs: other seeds of it, controls, other heads."""
import glob
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, load_yaml
from timm_spinal.training.variants import complete, differing, label

from .recipe import shared_options
from .source import Source, read_json


@dataclass
class Row:
    """The runs that differ in nothing but the seed."""
    label: str
    params: int
    published: bool = False
    top1: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.top1.values()) / len(self.top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        if len(self.top1) < 2:
            return None
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.top1.values()) / (len(self.top1) - 1))

    @property
    def text(self) -> str:
        spread = '' if self.spread is None else f' +- {self.spread:.2f}'
        return f'{self.mean:.2f}{spread}'


def result_rows(source: Source, beside: tuple[str, ...]) -> tuple[str, list[Row]]:
    """The published run's results and those of others, by what the runs differ in.

    Args:
        source: The published run.
        beside: Run folders, or wildcards of them.

    Returns:
        'test' or 'validation', the accuracy that is compared, and the rows, the published one first.

    Raises:
        UserError: A folder that is no finished run, or has other data or lacks the accuracy that is compared.
    """
    if source.args is None or source.result.get('top1') is None:
        return 'validation', []
    metric = 'test_top1' if source.result.get('test_top1') is not None else 'top1'
    runs = [(shared_options(source.args), source.result)] + [_read_run(folder) for folder in _folders(beside)]
    names = differing([settings for settings, _ in runs])
    rows: dict[str, Row] = {}
    for i, (settings, result) in enumerate(runs):
        if result.get(metric) is None or _data(result) != _data(source.result):
            raise UserError(f'--beside: the run of {settings["model"]}, seed {settings["seed"]}, is of other data or '
                            f'has no {metric} as the published one has; leave it out')
        row = rows.setdefault(label(settings, names), Row(label(settings, names), result['params']))
        row.published |= i == 0
        row.top1[settings['seed']] = result[metric]
    return metric.replace('top1', '').rstrip('_') or 'validation', list(rows.values())


def _data(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(k) for k in ('train_size', 'eval_size', 'test_images', 'num_classes'))


def _folders(beside: tuple[str, ...]) -> list[Path]:
    folders = []
    for pattern in beside:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise UserError(f'--beside {pattern}: nothing there matches')
        folders += [Path(f) for f in found]
    return folders


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    for name in ('args.yaml', 'result.json'):
        if not (folder / name).is_file():
            raise UserError(f'--beside {folder}: is no finished run (no {name}); leave it out')
    args = TrainConfig(**complete(load_yaml(folder / 'args.yaml')))
    return shared_options(args), read_json(folder / 'result.json')


def table(rows: list[Row], metric: str, data: str) -> str:
    """The rows as Markdown."""
    lines = [f'| model | parameters | seeds | {metric} top-1 on {data} (%) |', '|---|---|---|---|']
    for row in rows:
        name = f'**{row.label}**' if row.published else row.label
        lines.append(f'| {name} | {row.params:,} | {", ".join(map(str, sorted(row.top1)))} | {row.text} |')
    return '\n'.join(lines)
