"""The library of bit kernels, xnor.c, where it was built when the package was installed."""

import ctypes
import functools
import importlib.util
import os
from typing import Optional

import torch

ENVIRONMENT = 'TIMM_SPINAL_XNOR'
CHOICES = ('auto', 'portable', 'torch')
GRAIN = 2 ** 17  # predictions that are worth a thread, whose start takes as long as some 2 ** 16


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    spec = importlib.util.find_spec(f'{__package__}._xnor')
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # built for another system
        return None
    library.xnor_path.restype = ctypes.c_char_p
    library.xnor_run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_size_t] * 6 + [ctypes.c_int, ctypes.c_size_t]
    return library


def xnor_backend() -> str:
    """What computes with bits: 'avx2', 'neon' or 'portable' C code, or 'torch', which unpacks them.

    The best that there is, unless the environment variable ``TIMM_SPINAL_XNOR`` says 'portable' or 'torch'.

    Raises:
        ValueError: The variable holds another word.
    """
    choice = os.environ.get(ENVIRONMENT, 'auto')
    if choice not in CHOICES:
        raise ValueError(f"{ENVIRONMENT}='{choice}' is unknown; use {', '.join(CHOICES)}.")
    library = _library()
    if choice == 'torch' or library is None:
        return 'torch'
    return library.xnor_path().decode() if _may_use_simd() else 'portable'


def _may_use_simd() -> bool:
    return os.environ.get(ENVIRONMENT) != 'portable'


def can_run(x: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the library takes these tensors: values of at most 32 bits on the CPU."""
    narrow = x.dtype != torch.float64 and scale.dtype != torch.float64
    return narrow and x.device.type == 'cpu' and scale.device.type == 'cpu' and xnor_backend() != 'torch'


def run(
        x: torch.Tensor,
        bits: Optional[torch.Tensor],
        scale: Optional[torch.Tensor],
        out: torch.Tensor,
        capsules: int,
        in_dim: int,
        iterations: int,
) -> torch.Tensor:
    """Call ``xnor_run`` on as many threads as torch uses; shapes as in xnor.c, all but ``bits`` float32.

    Args:
        out: Filled and returned; v (B, J, D), or (B, N, J, D) with 0 iterations.
    """
    library = _library()
    assert library is not None
    batch, (classes, dim) = out.shape[0], out.shape[-2:]
    threads = batch * capsules * classes * dim * max(iterations, 1) // GRAIN
    if threads > 1:
        threads = min(threads, torch.get_num_threads())
    x = x.contiguous()
    bits = None if bits is None else bits.contiguous()
    scale = None if scale is None else scale.contiguous()
    failed = library.xnor_run(
        x.data_ptr(),
        None if bits is None else bits.data_ptr(),
        None if scale is None else scale.data_ptr(),
        out.data_ptr(),
        batch, capsules, in_dim, classes, dim, iterations, _may_use_simd(), max(threads, 1))
    if failed:
        raise MemoryError('No memory for the routing of packed capsules; use a smaller batch.')
    return out
