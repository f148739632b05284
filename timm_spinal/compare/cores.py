"""A CPU core for each piece of work, where that is faster than all cores for one piece."""
import ctypes
import platform
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Iterator

import torch

# settings of glibc, as in malloc.h and mallopt(3), and their values in bytes
_GLIBC = {
    -3: 32 * 2 ** 20,   # M_MMAP_THRESHOLD: blocks up to here, the most it can be, are not asked of the system each
    -1: 2 ** 30,        # M_TRIM_THRESHOLD: what is free is given back from here
    -2: 80 * 2 ** 20,   # M_TOP_PAD: more than an arena of a thread, which is not given back then when it is free
}


def _keep_freed_memory() -> None:
    """Let glibc keep blocks that are freed and asked for again in each step, in place of fresh pages every time."""
    if platform.libc_ver()[0] == 'glibc':
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in _GLIBC.items():
            mallopt(name, value)


@contextmanager
def core_each() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each of which computes with one; torch has its threads back at the end."""
    threads = torch.get_num_threads()
    _keep_freed_memory()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
