"""Where shared_basis.c computes a convolution over a basis: few unique filters, in eval mode, without gradients.

The operator itself is in shared_basis_op, which is imported when it is first called: to register it takes 30 ms.
"""

import ctypes
import functools
from typing import Optional, Sequence

import torch
from torch import nn

from . import c_library

MAX_UNIQUE = 8  # as in shared_basis.c: so few are cheaper apart, for convolutions compute 16 filters at a time
LANES = 16


@functools.cache
def library() -> Optional[ctypes.CDLL]:
    """The C library where it can compute this; else None."""
    found = c_library.declare(
        shared_basis_can_run=[], shared_basis_run=[ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p])
    return found if found is not None and found.shared_basis_can_run() else None


def is_transformed() -> bool:
    """Whether torch.func, such as vmap, is at work, under which tensors do not tell how they lie."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def infers(x: torch.Tensor) -> bool:
    """Whether x is computed with as it is: float32 on the CPU, nothing recorded, traced or cast."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = type(x) is torch.Tensor and x.is_cpu and x.dtype == torch.float32
    return plain and not recorded and not is_transformed() and not torch.is_autocast_enabled('cpu')


def is_hooked(*modules: nn.Module) -> bool:
    """Whether somebody looks at what goes into one of some modules or comes out, so that none may be left out."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


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
    return floats and fits and x.is_contiguous(memory_format=torch.channels_last) and library() is not None


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
