"""Two sides timed in turns in one run, so that a busy machine slows both alike."""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Callable, List, Sequence, Tuple

from tqdm import tqdm


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with their least and greatest."""

    median: float
    min: float
    max: float
    rounds: int

    def __str__(self) -> str:
        return f'{self.median:.3f} (min {self.min:.3f}, max {self.max:.3f}, {self.rounds} rounds)'


def times_in_turns(
        calls: Sequence[Callable[[], object]],
        rounds: int = 50,
        warmup: int = 3,
        progress: bool = False,
) -> Tuple[List[float], ...]:
    """Seconds of each call of every side: B C A, C A B, A B C, ... so that none always comes first.

    Args:
        calls: Each calls one side once, and returns when its work is done.
        rounds: Rounds that count, at least 1.
        warmup: Rounds before them that do not.
        progress: Show a progress bar.
    """
    times: Tuple[List[float], ...] = tuple([] for _ in calls)
    for i in tqdm(range(warmup + rounds), unit='round', leave=False, disable=not progress):
        for k in range(len(calls)):
            side = (i + k + 1) % len(calls)
            start = time.perf_counter()
            calls[side]()
            if i >= warmup:
                times[side].append(time.perf_counter() - start)
    return times


def paired_times(
        a: Callable[[], object],
        b: Callable[[], object],
        rounds: int = 50,
        warmup: int = 3,
        progress: bool = False,
) -> Tuple[List[float], List[float]]:
    """:func:`times_in_turns` of two sides."""
    first, second = times_in_turns((a, b), rounds, warmup, progress)
    return first, second


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of two sides that were measured in turns, one ratio for each round.

    Raises:
        ValueError: If the sides differ in length or are empty.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f'Paired ratios need rounds of both sides, got {len(numerators)} and {len(denominators)}.')
    ratios = [n / d for n, d in zip(numerators, denominators)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def machine_load() -> str:
    """What else the machine is doing, for the line beside a measurement: load average of a minute and cores."""
    load = f'{os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else 'unknown'
    return f'load {load} on {os.cpu_count()} cores'
