import platform
import subprocess
import sys
import threading

import pytest
import torch

from timm_spinal.compare.cores import core_each

PAGE = 4096


def test_one_thread_each_and_all_of_them_at_the_end():
    before = torch.get_num_threads()
    barrier = threading.Barrier(before, timeout=60)

    def threads():
        barrier.wait()  # so that every worker answers
        return torch.get_num_threads()

    with core_each() as pool:
        assert [future.result() for future in [pool.submit(threads) for _ in range(before)]] == [1] * before
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), core_each() as pool:
        pool.submit(lambda: 1 / 0).result()
    assert torch.get_num_threads() == before


PAGES = """
import resource
import torch
from timm_spinal.compare.cores import core_each

def new_pages():
    start = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    blocks = [torch.ones(%d, dtype=torch.uint8) for _ in range(6)]
    del blocks
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - start

with core_each() as pool:
    print(*pool.submit(lambda: [new_pages() for _ in range(16)]).result())
"""


# six of them are more than glibc keeps of its own accord, the greater ones also more than an arena holds
@pytest.mark.parametrize('block', [3 * 2 ** 20, 24 * 2 ** 20])
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another allocator')
def test_blocks_of_a_step_are_those_of_the_step_before(block):
    """In a process of its own: glibc keeps more where others have freed much before."""
    done = subprocess.run([sys.executable, '-c', PAGES % block], capture_output=True, text=True, timeout=100)
    counts = [int(count) for count in done.stdout.split()]
    assert len(counts) == 16, done.stderr
    assert counts[0] > block / PAGE > 8 * sum(counts[8:]), counts
