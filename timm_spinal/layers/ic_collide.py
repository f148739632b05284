"""The elementwise half of the inter-layer collision, y = z + ReLU(z - t + b1) + b2, written for memory traffic.

It has few operations per value, but as an expression it makes several full-size maps. In eager mode it works in place
and, on a CPU, by pieces that stay in the cache, forward and backward; for the backward pass it keeps one byte per
value, where sigma is active. Compilers, tracers and TorchScript get the expression, which the first fuse.
"""

from typing import Any, Iterator, Optional, Tuple

import torch

PIECE = 2 ** 18  # values of a piece: 1 MiB of float32, about a CPU core's cache


def collide_plain(
        z: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        groups: int,
        b1: Optional[torch.Tensor] = None,
        b2: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The definition of :func:`collide`."""
    u = z - (s.unsqueeze(2) * w.view(groups, -1, 1, 1)).flatten(1, 2)
    if b1 is not None:
        u = u + b1.view(-1, 1, 1)
    y = z + torch.relu(u)
    return y if b2 is None else y + b2.view(-1, 1, 1)


def _pieces(*tensors: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Tensors of N images each, cut alike: some images at a time on a CPU, all of them elsewhere."""
    first = tensors[0]
    images = max(1, len(first))
    if first.device.type == 'cpu':
        images = max(1, PIECE * images // max(1, first.numel()))
    return zip(*(tensor.split(images) for tensor in tensors))


def _collide_(
        z: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        b1: Optional[torch.Tensor],
        b2: Optional[torch.Tensor],
        active: Optional[torch.Tensor] = None,
) -> None:
    """z += ReLU(u) + b2 with u = z - s w + b1, and active = u > 0, all with axes (N, G, C / G, H, W)."""
    for z_, s_, *active_ in _pieces(z, s, *(() if active is None else (active,))):
        u = torch.addcmul(z_, s_, w, value=-1)
        if b1 is not None:
            u += b1
        for out in active_:
            torch.gt(u, 0, out=out)
        z_ += u.relu_()
        if b2 is not None:
            z_ += b2


def _gradients(
        grad: torch.Tensor,
        active: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        with_b1: bool,
        out: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, ...]:
    """Those of z, s (N, G, H, W), w (G, C / G) and b1 (G, C / G), from that of y with axes (N, G, C / G, H, W).

    Args:
        with_b1: Give the last one too.
        out: Where that of z is written.
    """
    du = active.view(torch.uint8).to(grad.dtype) * grad  # of bytes, which are faster here than bool
    dz = torch.add(grad, du, out=out)
    found = dz, -torch.einsum('ngkhw,gk->nghw', du, w), -torch.einsum('ngkhw,nghw->gk', du, s)
    return (*found, du.sum((0, 3, 4))) if with_b1 else found


def _gradients_by_piece(
        grad: torch.Tensor,
        active: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        with_b1: bool,
) -> Tuple[torch.Tensor, ...]:
    """:func:`_gradients` without further maps of full size."""
    dz, ds = torch.empty_like(grad), torch.empty_like(s)
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for _ in range(1 + with_b1)]
    for grad_, active_, s_, dz_, ds_ in _pieces(grad, active, s, dz, ds):
        _, found, *terms = _gradients(grad_, active_, s_, w, with_b1, dz_)
        ds_.copy_(found)
        for total, term in zip(sums, terms):
            total += term
    return dz, ds, *(total.to(w.dtype) for total in sums)


class _Collide(torch.autograd.Function):
    """:func:`collide`, with y in the place of z; also gives where sigma is active."""

    @staticmethod
    def forward(
            z: torch.Tensor,
            s: torch.Tensor,
            w: torch.Tensor,
            groups: int,
            b1: Optional[torch.Tensor],
            b2: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        active = torch.empty_like(z, dtype=torch.bool)
        _collide_(*_by_group(z, s, w, groups, b1, b2), active=_split(active, groups))
        return z, active

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
        z, s, w, ctx.groups = inputs[:4]
        ctx.mark_dirty(z)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], s, w)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        active, s, w = ctx.saved_tensors
        with_b1, with_b2 = ctx.needs_input_grad[4:]
        lean = grad.is_cpu and not torch.is_grad_enabled()
        dz, ds, *sums = (_gradients_by_piece if lean else _gradients)(
            _split(grad, ctx.groups), _split(active, ctx.groups), s, w.view(ctx.groups, -1), with_b1)
        dw, db1 = (sum.flatten() for sum in sums) if with_b1 else (sums[0].flatten(), None)
        return dz.flatten(1, 2), ds, dw, None, db1, grad.sum((0, 2, 3)) if with_b2 else None


def _split(z: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, C, H, W) as (N, G, C / G, H, W)."""
    return z.unflatten(1, (groups, -1))


def _by_group(
        z: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        groups: int,
        b1: Optional[torch.Tensor],
        b2: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The arguments of :func:`_collide_`."""
    shape = (1, groups, -1, 1, 1)
    return (
        _split(z, groups), s.unsqueeze(2), w.view(shape), b1 if b1 is None else b1.view(shape),
        b2 if b2 is None else b2.view(shape))


def collide(
        z: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        groups: int,
        b1: Optional[torch.Tensor] = None,
        b2: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """y = z + ReLU(z - t + b1) + b2 with t = w s, each filter's own factor times its group's map.

    Args:
        z: (N, C, H, W), a tensor that nothing else uses: it may be overwritten.
        s: (N, groups, H, W).
        w: (C,).
        groups: Number of groups of filters.
        b1: (C,).
        b2: (C,).
    """
    s, w = s.to(z.dtype), w.to(z.dtype)
    if b1 is not None:
        b1 = b1.to(z.dtype)
    if b2 is not None:
        b2 = b2.to(z.dtype)
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript looks at this condition alone
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            given = (z, s, w, b1, b2)
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
                return _Collide.apply(z, s, w, groups, b1, b2)[0]
            _collide_(*_by_group(z, s, w, groups, b1, b2))
            return z
    return collide_plain(z, s, w, groups, b1, b2)
