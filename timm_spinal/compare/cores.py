"""A CPU core for each piece of work, where that is faster than all cores for one piece."""
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Iterator

import torch


@contextmanager
def core_each() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each of which computes with one; torch has its threads back at the end."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
