"""Dropout on joined inputs by dropout.c, where the C library was built, else by torch with the same results."""

import ctypes
import functools
import math
from typing import Optional, Sequence, Tuple

import numpy as np
import torch

from . import c_library

RANGE = 2 ** 16  # dropout rates are taken to 16 bits


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    return c_library.declare(
        dropout_join=[
            ctypes.c_void_p, *[ctypes.c_size_t] * 2, *[ctypes.c_void_p] * 3, ctypes.c_uint16, ctypes.c_float,
            *[ctypes.c_void_p] * 2],
        dropout_scale_gradient=[*[ctypes.c_void_p] * 2, ctypes.c_size_t, ctypes.c_float, *[ctypes.c_size_t] * 2],
    )


def _library_for(*tensors: torch.Tensor) -> Optional[ctypes.CDLL]:
    """The library where it takes these tensors: float32 on the CPU."""
    return _library() if c_library.are_floats(*tensors) else None


def _threshold(p: float) -> int:
    return min(round(p * RANGE), RANGE - 1)


def draw_keep(p: float, size: int, generator: np.random.Generator) -> np.ndarray:
    """Booleans (size,), False with probability ``p`` to 16 bits; some twenty times as fast as torch's bernoulli_."""
    words = generator.integers(2 ** 64, size=-(-size // 4), dtype=np.uint64)  # four values from each draw
    return words.view(np.uint16)[:size] >= _threshold(p)


def join_and_drop(
        parts: Sequence[torch.Tensor],
        p: float,
        generator: np.random.Generator,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Dropout on ``torch.cat(parts, dim=1)``, without a gradient.

    Args:
        parts: Tensors (N, W_i).
        p: Dropout rate, in [0, 1).
        generator: Random numbers, as :func:`draw_keep` takes them.

    Returns:
        The result (N, W), and bytes (N, W) that are 1 where a number was kept.
    """
    rows, widths = parts[0].shape[0], [part.shape[1] for part in parts]
    shape = rows, sum(widths)
    library = _library_for(*parts)
    if library is None:
        kept = torch.from_numpy(draw_keep(p, math.prod(shape), generator).view(np.uint8)).view(shape)
        kept = kept.to(parts[0].device)
        return scale_kept(torch.cat(list(parts), dim=1), kept, p), kept
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    out, keep = torch.empty(shape), torch.empty(shape, dtype=torch.uint8)
    addresses = (ctypes.c_void_p * len(parts))(*[part.data_ptr() for part in parts])
    strides = (ctypes.c_size_t * len(parts))(*[part.stride(0) for part in parts])
    source = generator.bit_generator
    with source.lock:
        library.dropout_join(
            source.ctypes.bit_generator, rows, len(parts), addresses, strides, (ctypes.c_size_t * len(parts))(*widths),
            _threshold(p), 1. / (1. - p), out.data_ptr(), keep.data_ptr())
    return out, keep


def scale_kept(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """``x`` (N, W) times 1 / (1 - p) where ``keep`` (N, W) is 1, else 0; ``x`` is overwritten.

    This is the gradient of dropout, and dropout itself.
    """
    scale = 1. / (1. - p)
    library = _library_for(x)
    if library is None or not x.is_contiguous() or keep.stride(1) != 1:
        return x.mul_(keep.to(x.dtype) * scale)
    library.dropout_scale_gradient(x.data_ptr(), keep.data_ptr(), keep.stride(0), scale, *x.shape)
    return x
