"""What a comparison found, in plain words."""
from .runs import Comparison, RunResult
from .statistics import MIN_SEEDS, Difference, Estimate, Values, sampling_error


def findings(
        comparison: Comparison,
        rows: list[RunResult],
        values: dict[str, Values],
        gaps: list[Difference],
        metric: str,
) -> list[str]:
    """Sentences for the report, the most important first.

    Args:
        comparison: What was compared.
        rows: All its runs.
        values: The metric of the finished ones.
        gaps: The differences of `Comparison.pairs`.
        metric: One of `runs.METRICS`.
    """
    if not values:
        return ['No run has finished, so there is nothing to compare.', *_failures(rows)]
    against = [gap for gap in gaps if gap.control == comparison.control]
    sentences = [*_against_control(comparison, comparison.control, against),
                 *_against_strongest(comparison, comparison.strongest(rows, metric), rows, gaps),
                 *_equal_size(comparison, gaps), *_costs(comparison, rows)]
    if metric.startswith('val_'):
        sentences.append('The runs have read no test split: these are the accuracies that chose the epoch, and are too '
                         'high by an unknown amount.')
    return [*sentences, *_sampling(comparison, values, metric), *_failures(rows)]


def _against_control(comparison: Comparison, name: str, gaps: list[Difference]) -> list[str]:
    control = f'`{name}`'
    if not gaps:
        return [f'There is nothing to compare with the control {control}.']
    unknown = [gap for gap in gaps if gap.verdict == 'unknown']
    if len(unknown) == len(gaps):
        why = f'Fewer than {MIN_SEEDS} seeds, so there is no interval and no verdict: the differences may be chance.'
        if all(gap.estimate.seeds >= MIN_SEEDS for gap in gaps):
            why = 'The seeds do not differ, so there is no interval and no verdict.'
        return [why, *[f'`{g.variant}` is {_signed(g.estimate.mean)} points against {control}.' for g in gaps]]
    above = [gap for gap in gaps if gap.verdict == 'above']
    sentences = []
    if not above:
        sentences.append(f'No head beats {control} by more than its interval.' if comparison.kind == 'frozen' else
                         f'No variant beats {control} by more than its interval.')
    for gap in sorted(above, key=lambda g: -g.estimate.mean):
        sentences.append(f'`{gap.variant}` beats {control} by {_points(gap.estimate)}.')
    for gap in gaps:
        if gap.verdict == 'below':
            sentences.append(f'`{gap.variant}` is worse than {control} by {_points(gap.estimate, sign=-1)}.')
    left = [f'`{gap.variant}` ({_points(gap.estimate)})' for gap in gaps if gap.verdict == 'open']
    if left:
        sentences.append(f'Undecided against {control}: {", ".join(left)}.')
    for gap in unknown:
        sentences.append(f'`{gap.variant}` has {_signed(gap.estimate.mean)} points against {control} and no interval: '
                         f'{_why_none(gap.estimate)}.')
    return sentences


def _against_strongest(
        comparison: Comparison,
        strongest: str,
        rows: list[RunResult],
        gaps: list[Difference],
) -> list[str]:
    if not strongest:
        return []
    others = ', '.join(f'`{name}`' for name in comparison.controls if name != strongest)
    sentence = f'The strongest control on the validation split is `{strongest}` (the others: {others}).'
    against = [gap for gap in gaps if gap.control == strongest]
    if strongest == comparison.control or not against:
        return [sentence]
    return [sentence, *_against_control(comparison, strongest, against)]


def _equal_size(comparison: Comparison, gaps: list[Difference]) -> list[str]:
    words = {
        'above': 'beats {c}, an MLP of its size, by {p}.',
        'below': 'is worse than {c}, an MLP of its size, by {p}.',
        'open': 'and {c}, an MLP of its size, do not differ by more than the interval ({p}).',
    }
    sentences = []
    for gap in gaps:
        if comparison.sized_as.get(gap.control) == gap.variant and gap.verdict in words:
            points = _points(gap.estimate, sign=-1 if gap.verdict == 'below' else 1)
            text = words[gap.verdict].format(c=f'`{gap.control}`', p=points)
            sentences.append(f'`{gap.variant}` {text}')
    return sentences


def _costs(comparison: Comparison, rows: list[RunResult]) -> list[str]:
    params = {row.variant: row.params for row in rows if row.params}
    params.update({name: int(cost['params']) for name, cost in comparison.costs.items() if cost.get('params')})
    base = params.get(comparison.control)
    if not base:
        return []
    parts = [f'`{name}` {_times(count / base)}' for name, count in params.items() if name != comparison.control]
    what = 'parameters of the head' if comparison.kind == 'frozen' else 'parameters'
    sentences = [f'Against `{comparison.control}` ({count_text(base)} {what}) the cost in parameters is: '
                 f'{", ".join(parts)}.'] if parts else []
    slow = {name: cost.get('network_ms') for name, cost in comparison.costs.items()}
    reference = slow.get(comparison.control)
    if reference:
        times = [f'`{name}` {_times(ms / reference)}' for name, ms in slow.items() if ms and name != comparison.control]
        if times:
            sentences.append(f'One image through the whole network takes {reference:.1f} ms with '
                             f'`{comparison.control}`; with the others: {", ".join(times)}.')
    return sentences


def _sampling(comparison: Comparison, values: dict[str, Values], metric: str) -> list[str]:
    images = comparison.data.get('test_size' if metric.startswith('test_') else 'validation_size')
    measured = values.get(comparison.control)
    if not images or not measured:
        return []
    accuracy = sum(measured.values()) / len(measured)
    return [f'Intervals are over seeds on one fixed split of {images:,} images; another sample of as many images would '
            f'move every number by about {sampling_error(accuracy, images):.2f} points (standard error).']


def _failures(rows: list[RunResult]) -> list[str]:
    failed = [row for row in rows if row.status != 'done']
    if not failed:
        return []
    head = f'{len(failed)} of {len(rows)} runs are not in these numbers:'
    parts = [f'`{row.variant}` seed {row.seed} {row.status}' + (f' ({row.error})' if row.error else '')
             for row in failed]
    return [f'{head} {"; ".join(parts)}.']


def _points(gap: Estimate, sign: int = 1) -> str:
    low, high = sorted((sign * gap.low, sign * gap.high))  # type: ignore[operator]
    return f'{round(sign * gap.mean, 2) + 0.:.2f} points (interval {low:.2f} to {high:.2f}, {gap.seeds} seeds)'


def _why_none(gap: Estimate) -> str:
    if gap.seeds >= MIN_SEEDS:
        return 'the seeds do not differ'
    return f'{gap.seeds} seed{"s" if gap.seeds > 1 else ""} in common, and it takes {MIN_SEEDS}'


def _signed(value: float) -> str:
    return f'{value:+.2f}'


def _times(ratio: float) -> str:
    return f'{ratio:.0f}x' if ratio >= 10 else f'{ratio:.2g}x' if ratio < 1 or ratio >= 2 else f'{ratio:.2f}x'


def count_text(count: float) -> str:
    """A count as people write it: 1.31 M, 12.8 k."""
    for scale, unit in ((1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
        if count >= scale:
            return f'{count / scale:.3g}{unit}'
    return f'{count:.0f}'
