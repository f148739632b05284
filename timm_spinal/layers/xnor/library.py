"""The library made of xnor.c, where it was built when the package was installed."""

import ctypes
import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from typing import List, Optional

import torch

ENVIRONMENT = 'TIMM_SPINAL_XNOR'
PATHS = ('avx2', 'neon', 'portable')
KINDS = ('products', 'xnodr', 'xnidr')  # as in xnor.c, which says what their arguments are
LANES = 8  # class capsules have a multiple of so many dimensions
GRAIN = 2 ** 20  # predictions that are worth a thread
PRODUCT_COST = 1 / 8  # what a product costs beside a prediction


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    """The library; None where it was not built, or for another system or from other sources."""
    spec = importlib.util.find_spec(f'{__package__}._xnor')
    try:
        library = ctypes.CDLL(spec.origin) if spec is not None and spec.origin is not None else None
    except OSError:
        return None
    if library is None or not hasattr(library, 'xnor_path') or not hasattr(library, 'xnor_run'):
        return None
    library.xnor_path.argtypes = [ctypes.c_int]
    library.xnor_path.restype = ctypes.c_char_p
    library.xnor_run.argtypes = [*[ctypes.c_int] * 2, *[ctypes.c_void_p] * 4, *[ctypes.c_size_t] * 8]
    return library


@functools.cache
def xnor_paths() -> List[str]:
    """What there is to compute with on this machine, worst first: 'torch', then paths of the C code."""
    library = _library()
    names = ['torch']
    while library is not None and (path := library.xnor_path(len(names) - 1)):
        names.append(path.decode())
    return names


def xnor_backend() -> str:
    """The kernel that computes with bits: 'avx2', 'neon' or 'portable' C code, or 'torch', which unpacks them.

    It is the fastest one on this machine, unless the environment variable ``TIMM_SPINAL_XNOR`` names another.

    Raises:
        ValueError: The variable has an unknown value, or one that this machine does not support.
    """
    paths = xnor_paths()
    choice = os.environ.get(ENVIRONMENT, 'auto')
    if choice == 'auto':
        return paths[-1]
    if choice not in paths:
        reason = 'is not built or not on this processor' if choice in PATHS else 'is unknown'
        raise ValueError(f"{ENVIRONMENT}='{choice}' {reason}; use {', '.join(['auto', *reversed(paths)])}.")
    return choice


def can_run(x: torch.Tensor, scale: torch.Tensor, dim: int) -> bool:
    """Whether the library takes these tensors: at most 32 bits on the CPU, class capsules of 8, 16, 24, ..."""
    narrow = x.dtype != torch.float64 and scale.dtype != torch.float64
    on_cpu = x.device.type == 'cpu' and scale.device.type == 'cpu'
    return narrow and on_cpu and dim % LANES == 0 and xnor_backend() != 'torch'


def run(
        kind: str,
        x: torch.Tensor,
        bits: Optional[torch.Tensor],
        scale: Optional[torch.Tensor],
        out: torch.Tensor,
        capsules: int,
        in_dim: int,
        classes: int,
        dim: int,
        iterations: int = 0,
) -> torch.Tensor:
    """Call the C code on at most as many threads as torch uses, each with a part of the batch.

    Args:
        kind: One of ``KINDS``; x, bits, scale and out as xnor.c says.
        out: Contiguous; filled and returned.

    Raises:
        MemoryError: There is no memory for the routing.
    """
    library = _library()
    assert library is not None
    batch = out.shape[0]
    work = batch * capsules * classes * dim * (iterations or PRODUCT_COST)
    threads = max(1, min(int(work / GRAIN), torch.get_num_threads(), batch))
    tensors = [None if t is None else t.contiguous() for t in (x, bits, scale, out)]
    call = functools.partial(
        library.xnor_run,
        xnor_paths().index(xnor_backend()) - 1,
        KINDS.index(kind),
        *[None if t is None else t.data_ptr() for t in tensors],
        batch, capsules, in_dim, classes, dim, iterations)
    edges = [batch * k // threads for k in range(threads + 1)]
    if threads == 1:
        failed = call(0, batch)
    else:  # ctypes releases the GIL; the threads end here, so that a process that forks later has none
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(call, *share) for share in zip(edges[1:-1], edges[2:])]
            failed = call(0, edges[1]) + sum(other.result() for other in others)
    if failed:
        raise MemoryError('No memory for the routing of packed capsules; use a smaller batch.')
    return out
