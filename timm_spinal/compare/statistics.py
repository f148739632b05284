"""Means, intervals and paired differences over seeds, by SciPy.

Intervals are Student's t over seeds. Differences to a control are paired by seed, since a seed gives all variants the
same order of images. With m intervals of differences in a report each has the level 1 - 0.05 / m (Bonferroni), so that
all m hold together with 95 %; p values are adjusted by Benjamini and Hochberg. Fewer than `MIN_SEEDS` seeds have no
interval: that of two is twelve times as wide as their spread.
"""
import math
from dataclasses import astuple, dataclass
from typing import Sequence

import numpy as np
from scipy import stats

from .runs import Values as Values

MIN_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with its interval; none from too few seeds, or where the seeds do not differ at all."""
    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """Paired difference of a variant to a control, in the unit of the values.

    Attributes:
        p: Adjusted p value of the paired t test, or None where there is no interval.
    """
    variant: str
    control: str
    estimate: Estimate
    p: float | None

    @property
    def verdict(self) -> str:
        """'above' or 'below' where the interval leaves zero out, 'open' where not, 'unknown' without interval."""
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None:
            return 'unknown'
        return 'above' if low > 0 else 'below' if high < 0 else 'open'


    def reversed(self) -> 'Difference':
        """The control's difference to the variant."""
        mean, low, high, seeds = astuple(self.estimate)
        turned = Estimate(-mean, None if high is None else -high, None if low is None else -low, seeds)
        return Difference(self.control, self.variant, turned, self.p)


def estimate(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
    """Mean and t interval of some values.

    Raises:
        ValueError: No values.
    """
    if not len(values):
        raise ValueError('an estimate needs at least one value')
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    # values that agree to rounding say nothing about their spread
    if len(array) < MIN_SEEDS or np.ptp(array) <= 1e-9 * max(1., abs(mean)):
        return Estimate(mean, None, None, len(array))
    low, high = stats.t.interval(level, len(array) - 1, loc=mean, scale=stats.sem(array))
    return Estimate(mean, float(low), float(high), len(array))


def differences(pairs: Sequence[tuple[str, str]], values: dict[str, Values]) -> list[Difference]:
    """Each (variant, control) pair over the seeds that both have; pairs without a common seed are left out.

    Pairs that are left out, or have no interval, do not widen the intervals of the others.
    """
    both = {}
    for variant, control in pairs:
        seeds = sorted(values.get(variant, {}).keys() & values.get(control, {}).keys())
        if seeds:
            both[variant, control] = np.array([[values[name][s] for s in seeds] for name in (variant, control)])
    intervals = sum(estimate(ours - theirs).low is not None for ours, theirs in both.values())
    tested = []
    for (variant, control), (ours, theirs) in both.items():
        gap = estimate(ours - theirs, 1. - 0.05 / max(1, intervals))
        p = None if gap.low is None else float(stats.ttest_rel(ours, theirs).pvalue)
        tested.append((variant, control, gap, p))
    known = [p for *_, p in tested if p is not None]
    adjusted = iter(stats.false_discovery_control(known)) if known else iter(())
    return [
        Difference(variant, control, gap, None if p is None else float(next(adjusted)))
        for variant, control, gap, p in tested
    ]


def sampling_error(top1: float, images: int) -> float:
    """Standard error in percent points of an accuracy in percent because the test split is a sample."""
    part = min(max(top1 / 100., 0.), 1.)
    return 100. * math.sqrt(part * (1. - part) / images)
