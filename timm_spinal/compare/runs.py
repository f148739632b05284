"""What a comparison leaves on the disk and how it is read back.

    OUTPUT/compare.json                  what was compared: `Comparison`
    OUTPUT/runs/VARIANT/seed-N/          result.json and summary.csv as the trainer writes them; error.txt of a failure
    OUTPUT/features/                     of a comparison on frozen features
"""
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from timm_spinal.errors import UserError
from timm_spinal.evaluation.metrics import TITLES, main_accuracy
from timm_spinal.files import read_json as read_json
from timm_spinal.files import read_table
from timm_spinal.files import write_json as write_json
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.report import epochs_done
from timm_spinal.training.resume_checks import config_diff, diff_label, with_defaults
from timm_spinal.training.run_dir import FolderLock

from .controls import slug

Values = dict[int, float]  # seed -> measured value
# column of results.csv: its title in the report, in the order of preference (`metric_of`). "exact" is for images with
# two classes, both of which must be right
METRICS = {
    'test_top1': 'test top-1', 'val_top1': 'validation top-1',
    'test_exact': 'test exact pairs', 'val_exact': 'validation exact pairs',
}
MANIFEST, RESULT, SUMMARY, ERROR = 'compare.json', 'result.json', 'summary.csv', 'error.txt'
_RESTORE = 'restore it, or remove the run folder and run again'
# keys of result.json that are read, and their types
_RESULT_TYPES: dict[str, Any] = {
    **dict.fromkeys([*TITLES, *(f'test_{name}' for name in TITLES), 'loss', 'test_loss', 'seconds', 'lr',
                     'weight_decay', 'sign_flips'], float | None),
    **dict.fromkeys(['epoch', 'epochs', 'best_epoch', 'updates', 'params', 'num_classes', 'train_size', 'eval_size',
                     'test_images'], int | None),
    'chosen': dict[str, float], 'processes': int, 'versions': dict[str, str], 'hardware': str,
    'mixed_precision': str | None,
}


@dataclass
class Comparison:
    """What was compared, as `compare.json` keeps it.

    Attributes:
        kind: 'frozen', 'sweep' or 'runs' (run folders from elsewhere).
        command: The command line that made it.
        variants: Names in order.
        control: The variant that the others are compared with.
        sized_as: Control of equal size -> the variant whose size it has.
        seeds: Seeds of each variant.
        data: Name, sizes of the splits and a sentence on how they were made.
        setting: What all runs share, as name and value for the report.
        costs: For each variant, as `cost.Cost`.
        controls: Variants that are controls, the strongest of which the others are compared with too.
        tuned: For each variant, a list of grid points with their validation accuracy and whether chosen.
        folders: Run folders by variant and seed, where they are not under ``runs/``.
    """
    kind: str
    command: str
    variants: list[str]
    control: str
    seeds: list[int]
    sized_as: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    tuned: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    folders: dict[str, dict[str, str]] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)

    def pairs(self, strongest: str = '') -> list[tuple[str, str]]:
        """Comparisons of the report: each variant with the control, with the MLP that has as many parameters, and with
        the strongest control where that is another pair."""
        pairs = [(v, self.control) for v in self.variants if v != self.control]
        pairs += [(v, sized) for sized, v in self.sized_as.items() if sized != self.control]
        there = {frozenset(pair) for pair in pairs}
        return pairs + [(v, strongest) for v in self.variants
                        if strongest and v != strongest and frozenset((v, strongest)) not in there]

    def strongest(self, rows: list['RunResult'], metric: str) -> str:
        """The control that is best on the split that chooses, '' where there is but one, or none has finished.

        Args:
            rows: All runs.
            metric: The metric of the report; that of the validation split decides.
        """
        values = values_by_variant(rows, metric.replace('test_', 'val_'))
        means = {v: sum(values[v].values()) / len(values[v]) for v in self.controls if values.get(v)}
        return max(means, key=lambda v: means[v]) if len(means) > 1 else ''


@dataclass
class RunResult:
    """One run: a line of ``results.csv``.

    Accuracies and changed signs in percent, losses in nats; ``best_epoch`` counts from 0, ``epochs`` is their number.
    """
    variant: str
    seed: int
    status: str
    val_top1: float | None = None
    val_loss: float | None = None
    test_top1: float | None = None
    test_loss: float | None = None
    val_exact: float | None = None
    test_exact: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    params: int | None = None
    seconds: float | None = None
    mixed_precision: str | None = None
    sign_flips: float | None = None
    chosen: str = ''
    folder: str = ''
    error: str = ''


def run_folder(output: Path, variant: str, seed: int) -> Path:
    """Folder of one run."""
    return output / 'runs' / slug(variant) / f'seed-{seed}'


def write_comparison(output: Path, comparison: Comparison) -> None:
    """Write ``compare.json``."""
    write_json(output / MANIFEST, asdict(comparison))


def read_comparison(output: Path) -> Comparison | None:
    """Read ``compare.json``; None where there is none.

    Raises:
        UserError: The file is damaged or of another version.
    """
    raw = read_json(output / MANIFEST, get_type_hints(Comparison))
    if raw is None:
        return None
    try:
        return Comparison(**raw)
    except TypeError as e:
        raise UserError(f'{output / MANIFEST}: is not a comparison of this version; run it again') from e


def read_run_results(output: Path, comparison: Comparison) -> list[RunResult]:
    """The runs of a comparison in order, also those that failed or are missing."""
    rows = []
    for variant in comparison.variants:
        for seed in comparison.seeds:
            elsewhere = comparison.folders.get(variant, {})
            if elsewhere and str(seed) not in elsewhere:
                continue
            folder = Path(elsewhere[str(seed)]) if elsewhere else run_folder(output, variant, seed)
            rows.append(read_run_result(folder, variant, seed))
    return rows


def read_run_result(folder: Path, variant: str, seed: int) -> RunResult:
    """One run from its folder."""
    row = RunResult(variant, seed, 'missing', folder=str(folder))
    result, error = read_result(folder), folder / ERROR
    if error.exists():
        row.status, row.error = 'failed', ' '.join(error.read_text(encoding='utf-8', errors='replace').split())
    elif result is not None:
        name = main_accuracy(result)
        value = result.get(f'test_{name}', result.get(name))
        row.status = 'done' if value is not None else 'failed'
        row.error = '' if value is not None else 'no finite evaluation'
        row.val_top1, row.val_loss = result.get('top1'), result.get('loss')
        row.test_top1, row.test_loss = result.get('test_top1'), result.get('test_loss')
        row.val_exact, row.test_exact = result.get('exact'), result.get('test_exact')
        row.epochs = epochs_done(result)
        row.best_epoch, row.params, row.seconds = (result.get(k) for k in ('best_epoch', 'params', 'seconds'))
        row.sign_flips, row.mixed_precision = result.get('sign_flips'), result.get('mixed_precision')
        row.lr, row.weight_decay = result.get('lr'), result.get('weight_decay')
        row.chosen = ', '.join(f'{name} {value:.3g}' for name, value in result.get('chosen', {}).items())
    return row


def read_result(folder: Path) -> dict[str, Any] | None:
    """``result.json`` of a run; None where there is none.

    Raises:
        UserError: It is damaged.
    """
    return read_json(folder / RESULT, _RESULT_TYPES, _RESTORE)


def read_history(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's ``summary.csv``; an empty list where there is none."""
    return read_table(folder / SUMMARY, ('epoch',), fix=_RESTORE) if (folder / SUMMARY).exists() else []


def metric_of(rows: list[RunResult]) -> str:
    """The one of `METRICS` that every finished run has: of the test split if it can be."""
    done = [row for row in rows if row.status == 'done']
    return next((m for m in METRICS if done and all(getattr(row, m) is not None for row in done)), 'val_top1')


def values_by_variant(rows: list[RunResult], metric: str) -> dict[str, Values]:
    """The metric of every finished run by variant and seed."""
    values: dict[str, Values] = {}
    for row in rows:
        if row.status == 'done' and getattr(row, metric) is not None:
            values.setdefault(row.variant, {})[row.seed] = getattr(row, metric)
    return values


# ---- comparisons made of run folders -----------------------------------------------------------------------------


def comparisons_in(
        folders: list[Path],
        output: Path,
        control: str = '',
        command: str = '',
) -> list[tuple[Path, Comparison]]:
    """The comparisons of some folders.

    Args:
        folders: Folders of comparisons, each of which stays on its own; or run folders of the trainer, which become
            one comparison. Runs that differ in nothing but the seed are one variant.
        output: Folder of a comparison of run folders.
        control: Another control than the one they have; for run folders the first variant when ''.
        command: Command line, for a comparison of run folders.

    Raises:
        UserError: A folder that is neither, both kinds together, or an unknown control.
    """
    comparisons = [(folder, read_comparison(folder)) for folder in folders]
    runs = [folder for folder, comparison in comparisons if comparison is None]
    if not runs:
        existing = [(folder, comparison) for folder, comparison in comparisons if comparison is not None]
        for _, comparison in existing:
            comparison.control = _known_control(control or comparison.control, comparison.variants)
        return existing
    if len(runs) < len(comparisons):
        raise UserError(f'--report: {runs[0]} is not a comparison, but another one is; report on them one by one')
    for folder in runs:
        if not (folder / 'args.yaml').exists():
            raise UserError(f'{folder}: it contains neither a comparison (compare.json) nor a run of the trainer '
                            '(args.yaml); check --report')
    comparison = _from_runs(runs, control, command)
    with FolderLock(output):
        write_comparison(output, comparison)
    return [(output, comparison)]


def _known_control(control: str, variants: list[str]) -> str:
    if control not in variants:
        raise UserError(f'--control {control}: it is not one of the compared variants; choose one of '
                        f'{", ".join(variants)}')
    return control


def _from_runs(folders: list[Path], control: str, command: str) -> Comparison:
    settings = [with_defaults(load_yaml(folder / 'args.yaml')) for folder in folders]
    names = config_diff(settings)
    by_variant: dict[str, dict[str, str]] = {}
    for folder, values in zip(folders, settings):
        seeds = by_variant.setdefault(diff_label(values, names), {})
        if str(values['seed']) in seeds:
            raise UserError(f'{folder}: has the settings and the seed of {seeds[str(values["seed"])]}; leave one out')
        seeds[str(values['seed'])] = str(folder)
    variants = list(by_variant)
    first: dict[str, Any] = next((r for r in (read_result(folder) for folder in folders) if r), {})
    return Comparison(
        'runs', command, variants, _known_control(control or variants[0], variants),
        sorted({int(s) for seeds in by_variant.values() for s in seeds}),
        data=dict(name=first.get('dataset', ''), train_size=first.get('train_size'),
                  validation_size=first.get('eval_size'), test_size=first.get('test_images'), split=''),
        folders=by_variant,
    )
