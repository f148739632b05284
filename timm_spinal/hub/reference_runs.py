"""Results of a published run in one table with those of other runs: other seeds of it, controls, other heads."""
import glob
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from timm_spinal.compare.runs import read_comparison, read_result, read_run_results
from timm_spinal.errors import UserError
from timm_spinal.evaluation.metrics import TITLES
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.resume_checks import config_diff, diff_label, with_defaults

from .publication import Publication
from .recipe import shared_options
from .scores import compared_metric

OF_THE_MODEL = ('model', 'model_kwargs')


@dataclass
class ModelResults:
    """The runs that differ in nothing but the seed.

    Attributes:
        label: What they are called.
        params: Parameters of the network.
        published: The published run is one of them.
        values: Seed -> what is compared, in percent.
        choosing: Seed -> accuracy on the split that chose the epoch.
    """
    label: str
    params: int
    published: bool = False
    values: dict[int, float] = field(default_factory=dict)
    choosing: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.values.values()) / len(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        if len(self.values) < 2:
            return None
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values.values()) / (len(self.values) - 1))

    @property
    def text(self) -> str:
        spread = '' if self.spread is None else f' +- {self.spread:.2f}'
        return f'{self.mean:.2f}{spread}'


class Table(NamedTuple):
    """What stands in a card's table.

    Attributes:
        metric: What is compared, such as 'test top-1'.
        rows: The published run's row first.
        recipe: Options other than the model's in which the runs differ.
    """
    metric: str = ''
    rows: list[ModelResults] = []
    recipe: list[str] = []


class _Run(NamedTuple):
    settings: dict[str, Any]
    result: dict[str, Any]
    variant: str = ''  # its name in a comparison


def result_rows(publication: Publication, folders: tuple[str, ...]) -> Table:
    """The published run's results and those of others: the variants of a comparison, or what the runs differ in.

    Args:
        publication: The published run.
        folders: Run folders, wildcards of them, or the folder of a comparison that holds the published run.

    Raises:
        UserError: A folder that is no finished run, or has other data or lacks the accuracy that is compared.
    """
    if publication.args is None or not publication.scores:
        return Table()
    metric = compared_metric(publication.result)
    name = metric.removeprefix('test_')
    variant, others = _other_runs(publication, folders)
    runs = [_Run(shared_options(publication.args), publication.result, variant), *others]
    names = config_diff([run.settings for run in runs])
    rows: dict[str, ModelResults] = {}
    for i, (key, (settings, result, _)) in enumerate(zip(_labels(runs, names), runs)):
        if any(result.get(k) is None for k in (metric, name, 'params')) or _data(result) != _data(publication.result):
            raise UserError(f'--beside: the run of {settings["model"]}, seed {settings["seed"]}, is of other data or '
                            f'has no {metric} as the published one has; leave it out')
        row = rows.setdefault(key, ModelResults(key, result['params']))
        row.published |= i == 0
        if row.values.setdefault(settings['seed'], result[metric]) != result[metric]:
            raise UserError(f'--beside: two runs of {key} have seed {settings["seed"]}; leave one out')
        row.choosing[settings['seed']] = result[name]
    title = f'{"test" if metric != name else "validation"} {TITLES[name]}'
    return Table(title, list(rows.values()), [name for name in names if name not in OF_THE_MODEL])


def _labels(runs: list[_Run], names: list[str]) -> list[str]:
    """What each run is called: its variant, else its model, with the recipe where models are the same."""
    full = [run.variant or diff_label(run.settings, names) for run in runs]
    short = [run.variant or diff_label(_plain(run.settings), ['model']) for run in runs]
    return short if len(set(zip(short, full))) == len(set(short)) else full


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the model's options as part of its name."""
    options = ' '.join(f'{k}={v}' for k, v in settings['model_kwargs'].items())
    return dict(settings, model=f'{settings["model"]} {options}'.strip())


def _data(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(k) for k in ('train_size', 'eval_size', 'test_images', 'num_classes'))


def _other_runs(publication: Publication, patterns: tuple[str, ...]) -> tuple[str, list[_Run]]:
    """The published run's name in a comparison, '' outside of one, and the runs that it is compared with."""
    variant, runs = '', []
    for folder in _folders(patterns):
        comparison = read_comparison(folder)
        if comparison is None:
            runs.append(_read_run(folder))
            continue
        rows = [row for row in read_run_results(folder, comparison) if row.status == 'done']
        own = publication.folder and publication.folder.resolve()
        mine = [row.variant for row in rows if Path(row.folder).resolve() == own]
        if not mine:
            raise UserError(f'--beside {folder}: the published run is not one of this comparison; give run folders')
        variant = mine[0]
        runs += [_read_run(Path(row.folder))._replace(variant=row.variant) for row in rows]
    return variant, runs


def _folders(patterns: tuple[str, ...]) -> list[Path]:
    folders = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise UserError(f'--beside {pattern}: no folder matches it; check the path')
        folders += [Path(f) for f in matches]
    return folders


def _read_run(folder: Path) -> _Run:
    for name in ('args.yaml', 'result.json'):
        if not (folder / name).is_file():
            raise UserError(f'--beside {folder}: it is not a finished run (it has no {name}); leave it out')
    args = TrainConfig(**with_defaults(load_yaml(folder / 'args.yaml')))
    return _Run(shared_options(args), read_result(folder) or {})


def table(rows: list[ModelResults], metric: str, data: str) -> str:
    """The rows as Markdown."""
    lines = [f'| model | parameters | seeds | {metric} on {data} (%) |', '|---|---|---|---|']
    for row in rows:
        name = f'**{row.label}**' if row.published else row.label
        lines.append(f'| {name} | {row.params:,} | {", ".join(map(str, sorted(row.values)))} | {row.text} |')
    return '\n'.join(lines)
