"""Squash and xnorize: the two primitives of capsule layers with binary products.

Papers: "Dynamic Routing Between Capsules", Sabour et al., https://arxiv.org/abs/1710.09829, and
"XnODR and XnIDR: Two Accurate and Fast Fully Connected Layers for Convolutional Neural Networks", Sun et al.,
https://arxiv.org/abs/2111.10854 (docs/papers/xnodr_xnidr.md, sections 2 and 3).
"""

import torch


def float32_or_wider(x: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 as float32, anything else as it is."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


def squash(s: torch.Tensor) -> torch.Tensor:
    """v = |s|^2 / (1 + |s|^2) * s / |s| over the last axis: direction kept, length below 1.

    Written as s * |s| / (1 + |s|^2), of which value and gradient are 0 at s = 0. Computed in float32 or wider and
    returned in the type of ``s``.
    """
    wide = float32_or_wider(s)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (norm / (1. + norm * norm))).to(s.dtype)


def length(v: torch.Tensor) -> torch.Tensor:
    """|v| over the last axis, computed in float32 or wider, in the type of ``v``; the gradient is 0 at v = 0."""
    return torch.linalg.vector_norm(float32_or_wider(v), dim=-1).to(v.dtype)


def sign_ste(x: torch.Tensor) -> torch.Tensor:
    """+1 where x > 0, else -1 (so sgn(0) = -1), with the straight-through gradient: 1 for |x| <= 1, else 0.

    The bound is inclusive. Inputs of a capsule layer come out of a ReLU and about half of them are exactly 0, so that
    sgn(0) = +1 would make every input bit +1 (docs/papers/xnodr_xnidr.md, section 3).
    """
    sign = (x > 0).to(x.dtype).mul_(2.).sub_(1.)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return sign
    # the second term is zero and carries the gradient; clamp's gradient at the bounds differs between versions of torch
    return sign + torch.where(x.abs() <= 1., x - x.detach(), torch.zeros_like(x))


def mean_abs(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Scale of :func:`xnorize`: mean of |x| over ``dim``, kept as an axis of size 1, without gradient."""
    return x.detach().abs().mean(dim, keepdim=True)


def xnorize(x: torch.Tensor, dim: int) -> torch.Tensor:
    """sgn(x) times the mean of |x| over ``dim``; the gradient goes through the sign only.

    See docs/papers/xnodr_xnidr.md, section 3.
    """
    return sign_ste(x) * mean_abs(x, dim)
