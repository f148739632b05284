"""Two sides in turns in one run, so that a busy machine slows both alike; and the memory each takes by itself."""
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
from tqdm import tqdm

MIB = 2 ** 20
Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How both sides are measured; a side reads what concerns it."""
    batch_size: int = 8
    img_size: int = 224
    rounds: int = 20
    warmup: int = 2  # rounds before those that count
    threads: int = 1
    device: str = 'cpu'
    workers: int = 1
    batches: int = 8  # of an epoch: enough that its start does not count, for images of 224 pixels
    no_aug: bool = False


class Side(NamedTuple):
    """One side of a comparison, told so that another process can make it as well.

    Attributes:
        name: What the output calls it.
        make: A function of a module: ``make(setting, *args)`` gives a call without arguments, which does the work once
            and returns when it is done.
        args: Its further arguments.
    """
    name: str
    make: Callable[..., Call]
    args: tuple[Any, ...] = ()

    def call(self, setting: Setting) -> Call:
        """A new call of this side."""
        return self.make(setting, *self.args)


class Pair(NamedTuple):
    """What is measured, against what, and in which form."""
    what: Side
    against: Side
    form: str
    note: Callable[[Setting], str] | None = None  # a line on both sides, once for all forms


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with their least and greatest."""
    median: float
    min: float
    max: float
    rounds: int

    def __str__(self) -> str:
        return f'{self.median:.3f} ({self.min:.3f} to {self.max:.3f}, {self.rounds} rounds)'


def seconds_in_turns(first: Call, second: Call, setting: Setting, progress: bool = False) -> tuple[list[float], ...]:
    """Seconds of each call of both sides, which take turns in being the first of a round."""
    calls, times = (first, second), ([], [])  # type: tuple[Call, Call], tuple[list[float], list[float]]
    rounds = setting.warmup + setting.rounds
    for i in tqdm(range(rounds), unit='round', leave=False, disable=not progress):
        for side in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            calls[side]()
            if i >= setting.warmup:
                times[side].append(time.perf_counter() - start)
    return times


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of two sides that were measured in turns, one ratio for each round.

    Raises:
        ValueError: If the sides differ in length or are empty.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f'Paired ratios need rounds of both sides, got {len(numerators)} and {len(denominators)}.')
    ratios = [n / d for n, d in zip(numerators, denominators)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def measure(pair: Pair, setting: Setting, progress: bool = False) -> tuple[Ratio, float, float]:
    """Time of ``pair.what`` over that of ``pair.against``, and milliseconds of both (medians)."""
    what, against = pair.what.call(setting), pair.against.call(setting)
    times = seconds_in_turns(what, against, setting, progress)
    what_ms, against_ms = (1000 * statistics.median(side) for side in times)
    return paired_ratio(*times), what_ms, against_ms


def peak_memory(side: Side, setting: Setting) -> float:
    """MiB that one call takes above what lies in memory before it, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        return pool.submit(_peak, side, setting).result()


def _peak(side: Side, setting: Setting) -> float:
    torch.set_num_threads(setting.threads)
    side.call(replace(setting, batch_size=1, img_size=min(64, setting.img_size)))()  # what torch allocates once
    call = side.call(setting)
    before = process_memory('VmRSS')
    if Path('/proc/self/clear_refs').exists():
        Path('/proc/self/clear_refs').write_text('5')  # the peak so far, in which models were made, is forgotten
    call()
    return max(0., process_memory('VmHWM') - before)


def process_memory(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; where there is no /proc, the peak stands for both."""
    status = Path('/proc/self/status')
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == 'darwin' else peak * 1024 / MIB


def run(pairs: Sequence[Pair], setting: Setting, memory: bool = False, progress: bool = False) -> None:
    """Measure pairs one after the other, and print a line for each."""
    print(f'torch {torch.__version__}, {setting.device} ({_device(setting)}), {setting.threads} threads, batch '
          f'{setting.batch_size}, {setting.img_size} px; time ratio: median of paired ratios (least to greatest)')
    told = set()
    for pair in pairs:
        sides = f'{pair.what.name} / {pair.against.name}'
        if pair.note is not None and sides not in told:
            print(pair.note(setting))
            told.add(sides)
        ratio, what_ms, against_ms = measure(pair, setting, progress)
        line = f'{sides}, {pair.form}: {ratio}; {what_ms:.2f} and {against_ms:.2f} ms; {machine_load()}'
        if memory:
            peaks = [peak_memory(side, setting) for side in (pair.what, pair.against)]
            line += f'; peak memory {peaks[0]:,.0f} and {peaks[1]:,.0f} MiB'
        print(line, flush=True)


def _device(setting: Setting) -> str:
    if setting.device.startswith('cuda'):
        return torch.cuda.get_device_name(setting.device)
    return f'{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}'


def machine_load() -> str:
    """What else the machine is doing, for the line beside a measurement: load average of a minute and cores."""
    load = f'{os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else 'unknown'
    return f'load {load} on {os.cpu_count()} cores'
