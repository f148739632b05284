"""The report of a comparison: results.csv, table.md, table.html, accuracy.png, curves.png, report.md."""
import html
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from timm_spinal.errors import UserError
from timm_spinal.evaluation.figures import draw_reliability
from timm_spinal.evaluation.judgement import CONFUSION, WORST
from timm_spinal.evaluation.predictions import class_accuracy, read_predictions
from timm_spinal.training.report import write_table, write_text

from .figures import draw_accuracy, draw_curves
from .findings import count_text, findings
from .runs import METRICS, Comparison, RunResult, metric_of, read_comparison, read_run_results, values_by_variant
from .statistics import MIN_SEEDS, Difference, Values, differences, estimate


def write_report(
        output: Path,
        comparison: Comparison | None = None,
        per_class: bool = False,
        calibration: bool = False,
) -> list[str]:
    """Write the report of a comparison again, from its run folders.

    Args:
        output: Folder of the comparison.
        comparison: What was compared; read from ``compare.json`` when None.
        per_class: Write ``per_class.csv`` too.
        calibration: Draw ``calibration.png`` too.

    Returns:
        The findings.

    Raises:
        UserError: No comparison there, or predictions that the runs have not kept.
    """
    comparison = comparison or read_comparison(output)
    if comparison is None:
        raise UserError(f'{output}: it contains no comparison (no compare.json); give the folder that compare wrote, '
                        'or run folders of the trainer')
    rows = read_run_results(output, comparison)
    metric = metric_of(rows)
    values = values_by_variant(rows, metric)
    gaps = differences(comparison.pairs(comparison.strongest(rows, metric)), values)
    sentences = findings(comparison, rows, values, gaps, metric)
    table = table_rows(comparison, rows, values, gaps, metric)

    write_table(output / 'results.csv', [asdict(row) for row in rows])
    write_text(output / 'table.md', markdown_table(table))
    write_text(output / 'table.html', html_table(table))
    draw_accuracy(output / 'accuracy.png', values, _params(comparison, rows), metric)
    draw_curves(output / 'curves.png', rows)
    extra = []
    if per_class or calibration:
        predictions = predictions_by_variant(rows)
        if per_class:
            write_per_class(output / 'per_class.csv', predictions, comparison.data.get('class_names'))
            extra.append('Accuracy of each class: `per_class.csv`.')
        if calibration:
            joined = {v: (p['confidence'], p['prediction'] == p['target']) for v, p in predictions.items()}
            errors = draw_reliability(output / 'calibration.png', joined, 'test images, all seeds')
            extra.append('Expected calibration error (15 bins): ' + ', '.join(
                f'`{v}` {e:.2f} %' for v, e in errors.items()) + ' (`calibration.png`).')
    extra += _pictures(output, rows)
    shared = [*_precision(rows), _intervals(gaps)]
    write_text(output / 'report.md', report_text(comparison, [*sentences, *extra], markdown_table(table), shared))
    return sentences


# ---- the table --------------------------------------------------------------------------------------------------


def table_rows(
        comparison: Comparison,
        rows: list[RunResult],
        values: dict[str, Values],
        gaps: list[Difference],
        metric: str,
) -> list[dict[str, str]]:
    """One row of text for each variant; columns without any value are left out."""
    params = _params(comparison, rows)
    references = dict.fromkeys(filter(None, (comparison.control, comparison.strongest(rows, metric))))
    table = []
    for variant in comparison.variants:
        measured, cost = values.get(variant, {}), comparison.costs.get(variant, {})
        done = [row for row in rows if row.variant == variant and row.status == 'done']
        table.append({
            'variant': variant,
            'seeds': str(len(measured)),
            f'{METRICS[metric]}, % (95 % interval)': _accuracy(measured),
            **{column: text for i, reference in enumerate(references)
               for column, text in _against(variant, reference, gaps, 'p' if i == 0 else f'p, {reference}').items()},
            **_validation(done, metric),
            'signs changed, %': _mean([row.sign_flips for row in done], '.2f'),
            'parameters': count_text(params[variant]) if variant in params else '',
            'MACs': count_text(cost['macs']) if cost.get('macs') else '',
            'head, ms': f'{cost["head_ms"]:.3f}' if cost.get('head_ms') is not None else '',
            'network, ms': f'{cost["network_ms"]:.2f}' if cost.get('network_ms') else '',
            'training, s': _mean([row.seconds for row in done], '.1f'),
            'file, MB': f'{cost["file_mb"]:.2f}' if cost.get('file_mb') else '',
            'lr': _same([row.lr for row in done]),
            'weight decay': _same([row.weight_decay for row in done]),
            'chosen': '; '.join(dict.fromkeys(row.chosen for row in done if row.chosen)),
        })
    used = [column for column in table[0] if any(row[column] for row in table)]
    return [{column: row[column] for column in used} for row in table]


def markdown_table(table: list[dict[str, str]]) -> str:
    """The table in Markdown."""
    columns = list(table[0])
    align = ['---' if column == 'variant' else '---:' for column in columns]
    lines = [columns, align, *[[row[c].replace('|', '\\|') for c in columns] for row in table]]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def html_table(table: list[dict[str, str]]) -> str:
    """The table as a page of HTML."""
    head = ''.join(f'<th>{html.escape(column)}</th>' for column in table[0])
    body = '\n'.join(f'<tr>{"".join(f"<td>{html.escape(v)}</td>" for v in row.values())}</tr>' for row in table)
    style = 'table{border-collapse:collapse;font:14px sans-serif}td,th{border:1px solid #ccc;padding:4px 8px}'
    return (f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>comparison</title><style>{style}</style></head>'
            f'\n<body><table>\n<tr>{head}</tr>\n{body}\n</table></body></html>\n')


def _params(comparison: Comparison, rows: list[RunResult]) -> dict[str, int]:
    params = {row.variant: row.params for row in rows if row.params}
    params.update({v: int(c['params']) for v, c in comparison.costs.items() if c.get('params')})
    return params


def _validation(done: list[RunResult], metric: str) -> dict[str, str]:
    """The column of the split that chose the epoch, where the metric is of another split."""
    name = metric.replace('test_', 'val_')
    return {f'{METRICS[name]}, %': _mean([getattr(row, name) for row in done], '.2f')} if name != metric else {}


def _accuracy(measured: Values) -> str:
    if not measured:
        return 'no result'
    mean = estimate(list(measured.values()))
    return f'{mean.mean:.2f}' + (' (no interval)' if mean.half is None else f' ± {mean.half:.2f}')


def _against(variant: str, reference: str, gaps: list[Difference], p: str) -> dict[str, str]:
    """The columns of the difference to one control; a pair is measured once, so that it may be the other way round."""
    by_pair = {(gap.variant, gap.control): gap for gap in gaps}
    gap = by_pair.get((variant, reference))
    if gap is None and (reference, variant) in by_pair:
        gap = by_pair[reference, variant].reversed()
    return {
        f'difference to {reference} (interval)': '' if gap is None else _gap(gap),
        p: '' if gap is None or gap.p is None else f'{gap.p:.2g}',
    }


def _gap(gap: Difference) -> str:
    mean = gap.estimate
    interval = 'no interval' if mean.low is None else f'{mean.low:+.2f} to {mean.high:+.2f}'
    return f'{mean.mean:+.2f} ({interval})'


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else ''


def _same(values: list[float | None]) -> str:
    return ', '.join(f'{value:g}' for value in dict.fromkeys(values) if value is not None)


# ---- the text ---------------------------------------------------------------------------------------------------


def report_text(comparison: Comparison, sentences: list[str], table: str, shared: list[str]) -> str:
    """``report.md``; ``shared`` is what else holds for all runs."""
    data = comparison.data
    lines = ['# Comparison', '', '## Found', '', *[f'- {s}' for s in sentences], '', '## Results', '', table]
    lines += ['![accuracy against parameters](accuracy.png)', '', '![curves](curves.png)', '', '## How', '']
    if data:
        sizes = ', '.join(f'{data[k]:,} {text}' for k, text in (
            ('train_size', 'training'), ('validation_size', 'validation'), ('test_size', 'test')) if data.get(k))
        lines.append(f'- Data: {data.get("name", "")}' + (f': {sizes} images' if sizes else '') +
                     f'. {data.get("split", "")}'.rstrip())
    lines += [f'- {name}: {value}' for name, value in comparison.setting.items()]
    lines += [
        '- The epoch is chosen on the validation split; the test split is read once per run.',
        '- A seed gives every variant the same order of images (and, in a sweep, the same augmentation).',
        *[f'- {line}' for line in shared],
        '- Latencies are medians for one image on this machine, which may have had other work.',
    ]
    lines += _tuning(comparison.tuned)
    return '\n'.join([*lines, '', '## Command', '', '```', comparison.command, '```', ''])


def _intervals(gaps: list[Difference]) -> str:
    count = sum(gap.estimate.low is not None for gap in gaps)
    together = f' their intervals are corrected for the {count} comparisons that have one (Bonferroni: 95 % for all ' \
               'together); p: paired t test, adjusted by Benjamini and Hochberg.' if count else ' none has an interval.'
    return (f'Intervals of means: Student t, 95 %, over seeds; none of fewer than {MIN_SEEDS} seeds. Differences are '
            f'paired by seed;{together}')


def _precision(rows: list[RunResult]) -> list[str]:
    """What the runs computed in, as they say it themselves."""
    by_precision: dict[str, list[str]] = {}
    for row in rows:
        if row.mixed_precision:
            name = 'float32' if row.mixed_precision == 'no' else f'mixed precision, {row.mixed_precision}'
            variants = by_precision.setdefault(name, [])
            variants += [row.variant] if row.variant not in variants else []
    if len(by_precision) > 1:
        return [f'Precision: {name} for {", ".join(f"`{v}`" for v in variants)}.'
                for name, variants in by_precision.items()]
    return [f'Precision: {name}.' for name in by_precision]


def _pictures(output: Path, rows: list[RunResult]) -> list[str]:
    """What the first seed of each variant that has pictures gets wrong."""
    lines, shown = [], set()
    for row in rows:
        found = [file for file in (CONFUSION, WORST) if (Path(row.folder) / file).is_file()]
        if found and row.variant not in shown:
            shown.add(row.variant)
            addresses = [quote(os.path.relpath(Path(row.folder) / file, output)) for file in found]
            lines.append(f'`{row.variant}`, seed {row.seed}: ' + ' '.join(
                f'[![{file}]({address})]({address})' for file, address in zip(found, addresses)))
    return lines


def _tuning(tuned: dict[str, list[dict[str, Any]]]) -> list[str]:
    if not tuned:
        return []
    names = [name for name in next(iter(tuned.values()))[0] if name not in ('val_top1', 'chosen')]
    lines = ['', '## Tuning', '', 'Every variant had the same grid; the best mean validation accuracy was taken.', '',
             f'| variant | {" | ".join(names)} | validation accuracy, % | |', f'|---|{"---:|" * len(names)}---:|---|']
    for variant, points in tuned.items():
        for point in points:
            values = [str(point[name]) for name in names]
            top1 = 'failed' if point['val_top1'] is None else f'{point["val_top1"]:.2f}'
            lines.append(f'| {" | ".join([variant, *values, top1, "taken" if point["chosen"] else ""])} |')
    return lines


# ---- predictions ------------------------------------------------------------------------------------------------


def predictions_by_variant(rows: list[RunResult]) -> dict[str, dict[str, np.ndarray]]:
    """``prediction``, ``target`` and ``confidence`` of the test images of each variant, all seeds one after the other.

    Raises:
        UserError: A finished run has kept none.
    """
    by_variant: dict[str, list[dict[str, np.ndarray]]] = {}
    for row in rows:
        if row.status == 'done':
            kept = read_predictions(Path(row.folder))
            if kept is None:
                raise UserError(f'{row.folder}: has kept no test predictions, which --per-class and --calibration '
                                f'need; runs with a test split have them, but not where images have two classes')
            by_variant.setdefault(row.variant, []).append(kept)
    columns = ('prediction', 'target', 'confidence')
    return {v: {k: np.concatenate([p[k] for p in parts]) for k in columns} for v, parts in by_variant.items()}


def write_per_class(
        path: Path,
        predictions: dict[str, dict[str, np.ndarray]],
        class_names: list[str] | None,
) -> None:
    """Test accuracy in percent of each class and variant, mean over seeds."""
    classes = np.unique(np.concatenate([p['target'] for p in predictions.values()]))
    rows = []
    for c in classes:
        row = {'class': class_names[c] if class_names and c < len(class_names) else str(c)}
        for variant, p in predictions.items():
            row[variant] = f'{class_accuracy(p["prediction"], p["target"], c):.2f}'
        rows.append(row)
    write_table(path, rows)
