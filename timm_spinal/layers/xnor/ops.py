"""Packed capsule layers as torch operators, which compile, export, TorchScript and FX see as one node each.

On the CPU in up to 32 bits they run the C code of xnor.c, which is the fastest at every size that
``timm-spinal bench xnor`` measures. Elsewhere, where it was not built, and for class capsules whose dimension is no
multiple of 8, torch gives the same results.

They are for inference and have no gradient. Computed in float32 or wider, also under autocast; the answer has the type
of the weights. Equations: :class:`CapsuleRouting`, docs/papers/xnodr_xnidr.md, sections 3 and 5.
"""

from typing import Any

import torch

from ..capsule import float32_or_wider
from ..capsule_routing import dynamic_routing, without_autocast
from . import library, torch_twin

LARGEST_DIM = 127  # of packed capsules: sums of products are kept in int8
CHUNK = 2 ** 23  # float predictions that XnIDR makes at a time: 32 MiB


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f'iterations must be at least 1, got {iterations}.')


def _check_bits(x: torch.Tensor, bits: torch.Tensor) -> None:
    """The C code does not check sizes itself."""
    fits = bits.ndim == 4 and bits.shape[:2] == (x.shape[1], -(-x.shape[2] // 8))
    if bits.dtype != torch.uint8 or not fits or not 0 < x.shape[2] <= LARGEST_DIM:
        raise ValueError(f'Packed weights {tuple(bits.shape)} do not fit capsules {tuple(x.shape)}; make them by '
                         f'pack_signs, of capsules of at most {LARGEST_DIM} dimensions.')


def _check_shapes(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> None:
    _check_bits(x, bits)
    if scale.shape != (bits.shape[0], *bits.shape[2:]):
        raise ValueError(f'Scales {tuple(scale.shape)} do not fit packed weights {tuple(bits.shape)}; make them by '
                         'pack_signs.')


@torch.library.custom_op('timm_spinal::xnodr_products', mutates_args=())
def xnodr_products(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x (B, N, d) and signs of W -> P (B, N, J, D) = (sgn x)(sgn W), whole numbers -d .. d in int8.

    u_hat = P K_x alpha. In floats it would take four times the memory, whose writing would take most of the time.
    """
    _check_bits(x, bits)
    wide, (classes, dim) = float32_or_wider(x), bits.shape[2:]
    if library.can_run(wide, wide, dim):
        out = bits.new_empty(*x.shape[:2], classes, dim, dtype=torch.int8)
        return library.run('products', wide, bits, None, out, x.shape[1], x.shape[2], classes, dim)
    return torch_twin.products(wide, bits, torch.int8).transpose(0, 1).contiguous()


@torch.library.custom_op('timm_spinal::xnodr_routing', mutates_args=())
def xnodr_routing(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor, iterations: int) -> torch.Tensor:
    """x (B, N, d) and packed W -> class capsules v (B, J, D)."""
    _check_shapes(x, bits, scale)
    _check_iterations(iterations)
    wide, wide_scale = float32_or_wider(x), float32_or_wider(scale)
    classes, dim = scale.shape[1:]
    if library.can_run(wide, wide_scale, dim):
        out = wide.new_empty(x.shape[0], classes, dim)
        library.run('xnodr', wide, bits, wide_scale, out, x.shape[1], x.shape[2], classes, dim, iterations)
        return out.to(scale.dtype)
    with without_autocast(x):
        return torch_twin.route(wide, bits, wide_scale, iterations).to(scale.dtype).contiguous()


@torch.library.custom_op('timm_spinal::xnidr_routing', mutates_args=())
def xnidr_routing(x: torch.Tensor, projector: torch.Tensor, iterations: int) -> torch.Tensor:
    """x (B, N, d) and float W as (N, d, J, D) -> class capsules v (B, J, D), with an agreement of bits."""
    _check_iterations(iterations)
    wide, weight = float32_or_wider(x), float32_or_wider(projector)
    capsules, in_dim, classes, dim = projector.shape
    if not library.can_run(wide, weight, dim):
        routed = dynamic_routing(wide, weight.transpose(1, 2), iterations, xnor_agreement=True)
        return routed.to(projector.dtype).contiguous()
    out = wide.new_empty(x.shape[0], classes, dim)
    rows = max(1, CHUNK // (capsules * classes * dim))
    with without_autocast(x):
        for some, v in zip(wide.split(rows), out.split(rows)):
            u_hat = torch.bmm(some.transpose(0, 1), weight.flatten(2))
            library.run('xnidr', u_hat, None, None, v, capsules, in_dim, classes, dim, iterations)
    return out.to(projector.dtype)


@xnodr_products.register_fake
def _(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return bits.new_empty(*x.shape[:2], *bits.shape[2:], dtype=torch.int8)


@xnodr_routing.register_fake
def _(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor, iterations: int) -> torch.Tensor:
    return scale.new_empty(x.shape[0], *scale.shape[1:])


@xnidr_routing.register_fake
def _(x: torch.Tensor, projector: torch.Tensor, iterations: int) -> torch.Tensor:
    return projector.new_empty(x.shape[0], *projector.shape[2:])


def _refuse_gradient(ctx: Any, grad: torch.Tensor) -> None:
    raise RuntimeError('A packed capsule layer has no gradient; train the float model and pack it afterwards.')


for _op in (xnodr_routing, xnidr_routing):
    _op.register_autograd(_refuse_gradient)
