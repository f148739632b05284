"""The elementwise half of the inter-layer collision, y = z + ReLU(z - t), written for memory traffic.

It has few operations per value, but as an expression it makes several full-size maps. In eager mode it works in place
and, on a CPU, by pieces that stay in the cache; for the backward pass it keeps one byte per value, where z > t.
Compilers, tracers and TorchScript get the expression, which the first fuse.
"""

from typing import Any, Iterator, Optional, Tuple

import torch

PIECE = 2 ** 18  # values of a piece: 1 MiB of float32, about a CPU core's cache


def collide_plain(z: torch.Tensor, s: torch.Tensor, w: torch.Tensor, groups: int) -> torch.Tensor:
    """The definition of :func:`collide`."""
    t = (s.unsqueeze(2) * w.view(groups, -1, 1, 1)).flatten(1, 2)
    return z + torch.relu(z - t)


def _pieces(*tensors: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Tensors of N images each, cut alike: some images at a time on a CPU, all of them elsewhere."""
    first = tensors[0]
    images = max(1, len(first))
    if first.device.type == 'cpu':
        images = max(1, PIECE * images // max(1, first.numel()))
    return zip(*(tensor.split(images) for tensor in tensors))


def _by_group(
        z: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        groups: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (N, G, C / G, H, W), (N, G, 1, H, W) and (1, G, C / G, 1, 1)."""
    return z.unflatten(1, (groups, -1)), s.unsqueeze(2), w.view(1, groups, -1, 1, 1)


def _collide_(z: torch.Tensor, s: torch.Tensor, w: torch.Tensor, active: Optional[torch.Tensor] = None) -> None:
    """z += ReLU(z - s w), and active = z > s w, of the views of :func:`_by_group`."""
    for z_, s_, *active_ in _pieces(z, s, *(() if active is None else (active,))):
        u = torch.addcmul(z_, s_, w, value=-1)
        for out in active_:
            torch.gt(u, 0, out=out)
        z_.add_(u.relu_())


class _Collide(torch.autograd.Function):
    """:func:`collide`, with y in the place of z; also gives where z > t."""

    @staticmethod
    def forward(z: torch.Tensor, s: torch.Tensor, w: torch.Tensor, groups: int) -> Tuple[torch.Tensor, torch.Tensor]:
        active = torch.empty_like(z, dtype=torch.bool)
        _collide_(*_by_group(z, s, w, groups), active.unflatten(1, (groups, -1)))
        return z, active

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
        z, s, w, ctx.groups = inputs
        ctx.mark_dirty(z)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], s, w)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        active, s, w = ctx.saved_tensors
        du = grad * active
        grad_z = grad + du
        du, s, w = _by_group(du, s, w, ctx.groups)
        return grad_z, -(du * w).sum(2), -(du * s).sum((0, 3, 4)).flatten(), None


def collide(z: torch.Tensor, s: torch.Tensor, w: torch.Tensor, groups: int) -> torch.Tensor:
    """y = z + ReLU(z - t) with t = w s, each filter's own factor times its group's map.

    Args:
        z: (N, C, H, W), a tensor that nothing else uses: it may be overwritten.
        s: (N, groups, H, W).
        w: (C,).
        groups: Number of groups of filters.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript looks at this condition alone
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            s, w = s.to(z.dtype), w.to(z.dtype)
            if torch.is_grad_enabled() and (z.requires_grad or s.requires_grad or w.requires_grad):
                return _Collide.apply(z, s, w, groups)[0]
            _collide_(*_by_group(z, s, w, groups))
            return z
    return collide_plain(z, s, w, groups)
