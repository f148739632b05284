"""A CPU core for each piece of work, where that is faster than all cores for one piece."""
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Iterator

import torch

KEPT = 31 * 2 ** 20  # bytes; just under 32 MiB, above which glibc asks the system for every block anew


def _keep_freed_memory() -> None:
    """Let glibc keep blocks that are freed and asked for again in each step, in place of fresh pages every time.

    It gives back what is more than twice the largest block that it has mapped and freed so far; elsewhere this is one
    allocation.
    """
    torch.empty(KEPT, dtype=torch.uint8)


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
