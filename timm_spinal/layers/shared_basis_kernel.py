"""A convolution over a basis as shared_basis.c computes it: few unique filters, in eval mode, without gradients.

Facts: spec shared_basis 1.1 and 8.1 a. It is one torch operator, so that FLOP counters see it.
"""

import ctypes
import functools
from typing import Any, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import c_library

MAX_UNIQUE = 8  # as in shared_basis.c: so few are cheaper apart, for convolutions compute 16 filters at a time
LANES = 16
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


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    library = c_library.load()
    try:
        if library is None or not library.shared_basis_can_run():
            return None
        library.shared_basis_run.argtypes = [
            ctypes.POINTER(_Work), ctypes.c_size_t, ctypes.c_void_p]
    except AttributeError:  # another processor, or built from other sources
        return None
    return library


def is_transformed() -> bool:
    """Whether torch.func, such as vmap, is at work, under which tensors do not tell how they lie."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def infers(x: torch.Tensor) -> bool:
    """Whether x is computed with as it is: float32 on the CPU, nothing recorded, traced or cast."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = type(x) is torch.Tensor and x.is_cpu and x.dtype == torch.float32
    return plain and not recorded and not is_transformed() and not torch.is_autocast_enabled('cpu')


def can_run(x: torch.Tensor, unique: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the C code takes a convolution: float32, channels last, and :func:`infers`.

    Args:
        x: Images (N, C, H, W).
        unique: U.
        weights: The other weights, A the second of them.
    """
    if not infers(x):
        return False
    floats = all(t.dtype == torch.float32 and (t.is_cpu or t.is_mkldnn) for t in (unique, *weights))
    fits = 0 < len(unique) <= MAX_UNIQUE and len(weights[1]) % LANES == 0 and x.numel() > 0
    return floats and fits and x.is_contiguous(memory_format=torch.channels_last) and _library() is not None


def pack(basis: torch.Tensor, x: torch.Tensor, dilation: int) -> torch.Tensor:
    """B_s laid out as oneDNN wants it, so that it is not laid out anew for each convolution of a stage.

    Args:
        basis: B_s (s, C, k, k).
        x: Images of the size that all convolutions see.
        dilation: Dilation of the filters.
    """
    if not hasattr(torch.ops.mkldnn, '_convolution_pointwise'):  # not public: the compiler's
        return basis
    padding = dilation * (basis.shape[2] // 2)
    return torch.ops.mkldnn._reorder_convolution_weight(
        basis, [padding] * 2, [1, 1], [dilation] * 2, 1, list(x.shape))


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
    library = _library()
    assert library is not None
    library.shared_basis_run(ctypes.byref(work), threads, c_library.run_parallel())
    return out.permute(0, 3, 1, 2)


@shared_basis_conv.register_fake
def _(x: torch.Tensor, basis: Any, unique: Any, coeff: torch.Tensor, *args: Any) -> torch.Tensor:
    n, _, height, width = x.shape
    return x.new_empty(n, height, width, coeff.shape[0]).permute(0, 3, 1, 2)


@register_flop_formula(torch.ops.timm_spinal.shared_basis_conv)
def _flops(x: Any, basis: Any, unique: Any, coeff: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    rank, width = unique[0] + basis[0], unique[1] * unique[2] * unique[3]
    return 2 * x[0] * x[2] * x[3] * rank * (width + coeff[0])
