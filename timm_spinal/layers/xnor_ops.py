"""Packed capsule layers as torch operators, which compile, export, TorchScript and FX see as one node each.

On the CPU in up to 32 bits they run the C code of xnor.c, which is the fastest at every size that
``timm-spinal bench xnor`` measures. Elsewhere, where it was not built, and for class capsules whose dimension is no
multiple of 16, torch gives the same results: by XOR and popcount up to a batch of 8, above that by a product with
unpacked floats, which is faster then.

They are for inference and have no gradient. Computed in float32 or wider, also under autocast; the answer has the type
of the weights. Equations: :class:`CapsuleRouting`, spec capsule_xnor_heads 3 and 8.
"""

from typing import Any, Tuple

import torch
import torch.nn.functional as F

from . import xnor_kernel
from .capsule import float32_or_wider, mean_abs, xnorize
from .capsule_routing import dynamic_routing, route_predictions, without_autocast

POPCOUNT_BATCH = 8  # without C code; at 16 unpacking is as fast or faster for 10 to 1,000 classes (1 core, AVX2)
LARGEST_DIM = 127  # of packed capsules: sums of products are kept in int8
CHUNK = 2 ** 23  # float predictions that XnIDR makes at a time: 32 MiB


def pack_signs(weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """W (N, J, d, D) -> signs (N, ceil(d / 8), J, D) uint8 and scales alpha (N, J, D), the mean of |W| over d.

    Bit k % 8 of byte k / 8 is set where W[:, :, k] > 0, so that sgn(0) = -1; bits behind the last are 0.
    """
    positive = (weight > 0).to(torch.uint8)
    positive = F.pad(positive, (0, 0, 0, -positive.shape[2] % 8)).unflatten(2, (-1, 8))
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=weight.device)
    bits = (positive * places.unsqueeze(1)).sum(3, dtype=torch.uint8)
    return bits.transpose(1, 2).contiguous(), weight.abs().mean(2)


def unpack_signs(bits: torch.Tensor, scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Inverse of :func:`pack_signs`: sgn(W) alpha (N, J, d, D), for d = ``dim``."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device).view(8, 1, 1)
    positive = ((bits.unsqueeze(2) >> places) & 1).flatten(1, 2)[:, :dim]
    return positive.to(scale.dtype).mul_(2).sub_(1).mul_(scale.unsqueeze(1)).transpose(1, 2)


def sum_products(a: torch.Tensor, b: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of the products of ``dim`` signs: dim - 2 popcount(a XOR b), for bytes (..., q, J, D) that broadcast."""
    v = a ^ b
    v -= (v >> 1).bitwise_and_(0x55)
    pairs = (v >> 2).bitwise_and_(0x33)
    v = v.bitwise_and_(0x33).add_(pairs)
    v = v.add_(v >> 4).bitwise_and_(0x0f)
    return v.sum(-3, dtype=dtype).mul_(-2).add_(dim)


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f'iterations must be at least 1, got {iterations}.')


def _check_bits(x: torch.Tensor, bits: torch.Tensor) -> None:
    """The C code trusts its sizes."""
    fits = bits.ndim == 4 and bits.shape[:2] == (x.shape[1], -(-x.shape[2] // 8))
    if bits.dtype != torch.uint8 or not fits or not 0 < x.shape[2] <= LARGEST_DIM:
        raise ValueError(f'Packed weights {tuple(bits.shape)} do not fit capsules {tuple(x.shape)}; make them by '
                         f'pack_signs, of capsules of at most {LARGEST_DIM} dimensions.')


def _check_shapes(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> None:
    _check_bits(x, bits)
    if scale.shape != (bits.shape[0], *bits.shape[2:]):
        raise ValueError(f'Scales {tuple(scale.shape)} do not fit packed weights {tuple(bits.shape)}; make them by '
                         'pack_signs.')


def _torch_products(x: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Capsules in front (N, B, d), as torch.bmm would leave them: routing is faster on that."""
    x_bits = pack_signs(x.reshape(-1, 1, x.shape[2], 1))[0].unflatten(0, x.shape[:2])
    return sum_products(x_bits, bits.unsqueeze(1), x.shape[2], dtype)


def _torch_predictions(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = x.transpose(0, 1)
    products = _torch_products(x, bits, x.dtype)
    return products.mul_(mean_abs(x, 2).unsqueeze(3)).mul_(scale.unsqueeze(1)).transpose(0, 1)


@torch.library.custom_op('timm_spinal::xnodr_products', mutates_args=())
def xnodr_products(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x (B, N, d) and signs of W -> P (B, N, J, D) = (sgn x)(sgn W), whole numbers -d .. d in int8.

    u_hat = P K_x alpha. In floats it would take four times the memory, whose writing would take most of the time.
    """
    _check_bits(x, bits)
    wide, (classes, dim) = float32_or_wider(x), bits.shape[2:]
    if xnor_kernel.can_run(wide, wide, dim):
        out = bits.new_empty(*x.shape[:2], classes, dim, dtype=torch.int8)
        return xnor_kernel.run('products', wide, bits, None, out, x.shape[1], x.shape[2], classes, dim)
    return _torch_products(wide.transpose(0, 1), bits, torch.int8).transpose(0, 1).contiguous()


@torch.library.custom_op('timm_spinal::xnodr_routing', mutates_args=())
def xnodr_routing(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor, iterations: int) -> torch.Tensor:
    """x (B, N, d) and packed W -> class capsules v (B, J, D)."""
    _check_shapes(x, bits, scale)
    _check_iterations(iterations)
    wide, wide_scale = float32_or_wider(x), float32_or_wider(scale)
    classes, dim = scale.shape[1:]
    if xnor_kernel.can_run(wide, wide_scale, dim):
        out = wide.new_empty(x.shape[0], classes, dim)
        xnor_kernel.run('xnodr', wide, bits, wide_scale, out, x.shape[1], x.shape[2], classes, dim, iterations)
        return out.to(scale.dtype)
    with without_autocast(x):
        if x.shape[0] <= POPCOUNT_BATCH:
            u_hat = _torch_predictions(wide, bits, wide_scale)
            return route_predictions(u_hat, iterations, xnor_agreement=False).to(scale.dtype).contiguous()
        weight = unpack_signs(bits, wide_scale, x.shape[2])
        return dynamic_routing(xnorize(wide, 2), weight, iterations).to(scale.dtype).contiguous()


@torch.library.custom_op('timm_spinal::xnidr_routing', mutates_args=())
def xnidr_routing(x: torch.Tensor, projector: torch.Tensor, iterations: int) -> torch.Tensor:
    """x (B, N, d) and float W as (N, d, J, D) -> class capsules v (B, J, D), with an agreement of bits."""
    _check_iterations(iterations)
    wide, weight = float32_or_wider(x), float32_or_wider(projector)
    capsules, in_dim, classes, dim = projector.shape
    if not xnor_kernel.can_run(wide, weight, dim):
        routed = dynamic_routing(wide, weight.transpose(1, 2), iterations, xnor_agreement=True)
        return routed.to(projector.dtype).contiguous()
    out = wide.new_empty(x.shape[0], classes, dim)
    rows = max(1, CHUNK // (capsules * classes * dim))
    with without_autocast(x):
        for some, v in zip(wide.split(rows), out.split(rows)):
            u_hat = torch.bmm(some.transpose(0, 1), weight.flatten(2))
            xnor_kernel.run('xnidr', u_hat, None, None, v, capsules, in_dim, classes, dim, iterations)
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
