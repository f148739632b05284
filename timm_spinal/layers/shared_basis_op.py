"""A convolution over a basis as shared_basis.c computes it, as one torch operator, so that FLOP counters see it.

Facts: spec shared_basis 1.1 and 8.1 a. Where it can be called, shared_basis_kernel says.
"""

import ctypes
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import c_library
from .shared_basis_kernel import LANES, library

GRAIN = 2 ** 18  # multiplications that are worth a thread

_POINTERS = ('x', 'z', 'unique', 'coeff', 'norms', 'shortcut', 'space', 'out')
_SIZES = ('batch', 'height', 'width', 'chs', 'kernel', 'dilation', 'filters', 'shared', 'out_chs', 'columns',
          'unique_chs', 'unique_tap')


class _Work(ctypes.Structure):
    """``struct work`` of shared_basis.c."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in _POINTERS],
        *[(name, ctypes.c_size_t) for name in _SIZES],
        ('normed', ctypes.c_int),
        ('relu', ctypes.c_int),
        ('eps', ctypes.c_float),
        ('eps2', ctypes.c_float),
    ]


def _shared_product(x: torch.Tensor, basis: torch.Tensor, dilation: int) -> torch.Tensor:
    padding = dilation * (basis.shape[2] // 2)
    if not basis.is_mkldnn:
        return F.conv2d(x, basis, None, 1, padding, dilation)
    return torch.ops.mkldnn._convolution_pointwise(
        x, basis, None, [padding] * 2, [1, 1], [dilation] * 2, 1, 'none', [], '')


@torch.library.custom_op('timm_spinal::shared_basis_conv', mutates_args=())
def shared_basis_conv(
        x: torch.Tensor,
        basis: torch.Tensor,
        unique: torch.Tensor,
        coeff: torch.Tensor,
        norms: List[torch.Tensor],
        eps: List[float],
        dilation: int,
        shortcut: Optional[torch.Tensor] = None,
        relu: bool = False,
) -> torch.Tensor:
    """y = A' . [U; B_s] * x + b', plus a shortcut, through a ReLU: (N, T, H, W), channels last.

    Args:
        x: Images (N, C, H, W), for which :func:`can_run` holds.
        basis: B_s (s, C, k, k), as it is or from :func:`pack`.
        unique: U (u, C, k, k).
        coeff: A (T, u + s, 1, 1).
        norms: Weight, bias, running mean and variance of the basis' norm, then those of the convolution's; or b' alone,
            and then A' = A.
        eps: Of both norms; or empty.
        dilation: Dilation of the filters.
        shortcut: (N, T, H, W), or None.
        relu: Whether there is a ReLU behind all of it.
    """
    n, chs, height, width = x.shape
    filters, kernel, out_chs, shared = len(unique), unique.shape[2], len(coeff), len(basis)
    columns = -(-filters * kernel * kernel // LANES) * LANES
    pixels, rank = n * height * width, filters + shared
    last = torch.channels_last
    z = _shared_product(x, basis, dilation).contiguous(memory_format=last)
    strides = (1, chs)
    if not unique.is_contiguous(memory_format=last):
        unique, strides = unique.contiguous(), (kernel * kernel, 1)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=last)
    coeff, *norms = [t if t.is_contiguous() else t.contiguous() for t in (coeff, *norms)]
    out = x.new_empty(n, height, width, out_chs)
    space = x.new_empty((chs + pixels) * columns + (rank + 3) * out_chs + 2 * rank)
    pointers = (ctypes.c_void_p * len(norms))(*[t.data_ptr() for t in norms])
    work = _Work(
        x.data_ptr(), z.data_ptr(), unique.data_ptr(), coeff.data_ptr(), ctypes.cast(pointers, ctypes.c_void_p),
        None if shortcut is None else shortcut.data_ptr(), space.data_ptr(), out.data_ptr(),
        n, height, width, chs, kernel, dilation, filters, shared, out_chs, columns, *strides, bool(eps), relu, *eps)
    threads = max(1, min(pixels * (chs * columns + rank * out_chs) // GRAIN, torch.get_num_threads()))
    c_code = library()
    assert c_code is not None
    c_code.shared_basis_run(ctypes.byref(work), threads, c_library.run_parallel())
    return out.permute(0, 3, 1, 2)


@shared_basis_conv.register_fake
def _(x: torch.Tensor, basis: Any, unique: Any, coeff: torch.Tensor, *args: Any) -> torch.Tensor:
    n, _, height, width = x.shape
    return x.new_empty(n, height, width, coeff.shape[0]).permute(0, 3, 1, 2)


@register_flop_formula(torch.ops.timm_spinal.shared_basis_conv)
def _flops(x: Any, basis: Any, unique: Any, coeff: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    rank, width = unique[0] + basis[0], unique[1] * unique[2] * unique[3]
    return 2 * x[0] * x[2] * x[3] * rank * (width + coeff[0])
