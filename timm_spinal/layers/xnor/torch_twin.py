"""Signs in bytes, and the products of xnor.c in plain torch: by XOR and popcount of whole bytes."""

from typing import Tuple

import torch
import torch.nn.functional as F

from ..capsule import mean_abs, xnorize
from ..capsule_routing import dynamic_routing, route_predictions

POPCOUNT_BATCH = 8  # at 16 unpacking is as fast or faster for 10 to 1,000 classes (1 core, AVX2)


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


def products(x: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (B, N, d) and signs of W -> (sgn x)(sgn W), (N, B, J, D), the order that routing is faster in."""
    x = x.transpose(0, 1)
    x_bits = pack_signs(x.reshape(-1, 1, x.shape[2], 1))[0].unflatten(0, x.shape[:2])
    return sum_products(x_bits, bits.unsqueeze(1), x.shape[2], dtype)


def route(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor, iterations: int) -> torch.Tensor:
    """x (B, N, d) and packed W -> class capsules v (B, J, D) of XnODR.

    By XOR and popcount up to a batch of 8, above that by a product with unpacked floats, which is faster then.
    """
    if x.shape[0] > POPCOUNT_BATCH:
        return dynamic_routing(xnorize(x, 2), unpack_signs(bits, scale, x.shape[2]), iterations)
    k_x = mean_abs(x, 2).transpose(0, 1).unsqueeze(3)
    u_hat = products(x, bits, x.dtype).mul_(k_x).mul_(scale.unsqueeze(1)).transpose(0, 1)
    return route_predictions(u_hat, iterations, xnor_agreement=False)
