"""Memory of this process, for measurements that have a process of their own."""

import resource
import sys
from pathlib import Path

MIB = 2 ** 20


def process_memory(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; where there is no /proc, the peak stands for both."""
    status = Path('/proc/self/status')
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == 'darwin' else peak * 1024 / MIB
