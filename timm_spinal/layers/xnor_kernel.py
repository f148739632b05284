"""The bit kernels of xnor.c, where the C library was built."""

import ctypes
import functools
import os
from typing import List, Optional

import torch

from . import c_library

ENVIRONMENT = 'TIMM_SPINAL_XNOR'
PATHS = ('avx512', 'avx2', 'neon', 'portable')
KINDS = ('products', 'xnodr', 'xnidr', 'agreement')  # as in xnor.c, which says what their arguments are
LANES = 16  # class capsules have a multiple of so many dimensions
GRAIN = 2 ** 15  # predictions that are worth a thread
PRODUCT_COST = 1 / 8  # what a product or an agreement costs beside a prediction


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    library = c_library.declare(
        xnor_path=[ctypes.c_int],
        xnor_compute_shares=[
            ctypes.c_int, *[ctypes.c_void_p] * 4, *[ctypes.c_size_t] * 6, ctypes.c_int, ctypes.c_size_t,
            ctypes.c_void_p],
    )
    if library is not None:
        library.xnor_path.restype = ctypes.c_char_p
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
    """What computes with bits: 'avx512', 'avx2', 'neon' or 'portable' C code, or 'torch', which unpacks them.

    The best that there is, unless the environment variable ``TIMM_SPINAL_XNOR`` names another.

    Raises:
        ValueError: The variable holds another word, or what this machine has not.
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
    """Whether the library takes these tensors: values of at most 32 bits on the CPU, class capsules of 16, 32, ..."""
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
    """Call the C code on as many threads as torch uses, which are torch's.

    Args:
        kind: One of ``KINDS``; x, bits, scale and out as xnor.c says.
        out: Contiguous; filled and returned.
    """
    library = _library()
    assert library is not None
    batch = out.shape[0]
    work = batch * capsules * classes * dim * (iterations or PRODUCT_COST)
    threads = max(1, min(int(work / GRAIN), torch.get_num_threads()))
    tensors = [None if t is None else t.contiguous() for t in (x, bits, scale)]
    failed = library.xnor_compute_shares(
        KINDS.index(kind),
        *[None if t is None else t.data_ptr() for t in tensors],
        out.data_ptr(),
        batch, capsules, in_dim, classes, dim, iterations, xnor_paths().index(xnor_backend()) - 1, threads,
        c_library.run_parallel())
    if failed:
        raise MemoryError('No memory for the routing of packed capsules; use a smaller batch.')
    return out
