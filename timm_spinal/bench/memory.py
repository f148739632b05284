"""Memory of this process, for measurements that have a process of their own."""

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable

MIB = 2 ** 20


def process_memory(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; where there is no /proc, the peak stands for both."""
    status = Path('/proc/self/status')
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == 'darwin' else peak * 1024 / MIB


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function answers in a new process, where nothing else has taken memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()
