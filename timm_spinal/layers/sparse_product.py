"""Matrix products that pass over zeros, by sparse_product.c: faster than dense ones from about four zeros in ten."""

import ctypes
import functools
from typing import Optional

import torch

from . import c_library

WIDTH_MULTIPLE = 64  # COLUMNS of sparse_product.c


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    library = c_library.declare(
        sparse_product_can_run=[],
        sparse_product=[
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, *[ctypes.c_size_t] * 2, *[ctypes.c_void_p] * 3,
            ctypes.c_size_t],
    )
    return library if library is not None and library.sparse_product_can_run() else None


def can_multiply(x: torch.Tensor, width: int) -> bool:
    """Whether :func:`sparse_product` takes ``x`` and gives results of this width: on a CPU with AVX-512, in float32."""
    return width % WIDTH_MULTIPLE == 0 and c_library.are_floats(x) and _library() is not None


def sparse_product(x: torch.Tensor, b: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """``x @ b + bias`` on one thread, without a gradient; a zero in ``x`` times anything is 0.

    Args:
        x: Matrix (M, K) with many zeros, or such a matrix transposed, for which :func:`can_multiply` holds.
        b: Matrix (K, N), N a multiple of 64.
        bias: Vector (N,).
    """
    library = _library()
    assert library is not None and can_multiply(x, b.shape[1]), 'see can_multiply'
    transposed = x.stride(0) == 1 and x.stride(1) != 1
    if not transposed and x.stride(1) != 1:
        x = x.contiguous()
    b, bias = b.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], b.shape[1])
    done = library.sparse_product(
        x.data_ptr(), x.stride(1 if transposed else 0), transposed, *x.shape, b.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), b.shape[1])
    if not done:
        raise MemoryError('sparse_product: no memory for its lists')
    return y
