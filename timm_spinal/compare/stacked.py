"""Several models of one kind as one: the seeds of a head trained together.

`StackedHeads` holds each parameter of M heads as one tensor with a leading dimension M and computes all of them by
`torch.func`; `SeparateHeads` calls them one after the other. Both draw dropout from one generator for each seed, so
that a seed has the same result in either, and alone or in company, but for rounding.
"""
import copy
import math
from typing import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from timm_spinal.layers.dropout_kernel import draw_keep, join_and_drop

Named = dict[str, torch.Tensor]


class SeededDropout(nn.Module):
    """`nn.Dropout` with a generator of its own, or with masks drawn beforehand.

    Attributes:
        masks: Where set, gives the (scaled) mask of each call in turn.
        shapes: Where set, gets the shape of each call and drops nothing.
    """

    def __init__(self, p: float, generator: np.random.Generator):
        super().__init__()
        self.p = p
        self.generator = generator
        self.masks: Iterator[torch.Tensor] | None = None
        self.shapes: list[tuple[float, torch.Size]] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.:
            return x
        if self.shapes is not None:
            self.shapes.append((self.p, x.shape))
            return x
        if self.masks is not None:
            mask = next(self.masks)
        elif x.ndim == 2 and not x.requires_grad:
            return join_and_drop([x], self.p, self.generator)[0]
        else:
            mask = draw_masks(self.p, x.shape, [self.generator])[0]
        return x * mask.to(x.device)


def draw_masks(p: float, shape: Sequence[int], generators: Sequence[np.random.Generator]) -> torch.Tensor:
    """A mask from each generator, (M, *shape): zeros with probability p to 16 bits, else 1 / (1 - p)."""
    size = math.prod(shape)
    masks = np.empty((len(generators), size), dtype=np.float32)
    for mask, generator in zip(masks, generators):
        np.multiply(draw_keep(p, size, generator).view(np.uint8), np.float32(1. / (1. - p)), out=mask)
    return torch.from_numpy(masks).view(len(generators), *shape)


def seed_dropout(head: nn.Module, seed: int) -> np.random.Generator:
    """Replace every dropout of a head, in place, by one that draws from the seed's generator."""
    generator = np.random.Generator(np.random.SFC64(seed))
    for module in list(head.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, SeededDropout(child.p, generator))
    return generator


class SeparateHeads:
    """M heads, one after the other. Inputs are (M, B, ...) in training and (N, ...), the same for all, otherwise."""

    def __init__(self, heads: list[nn.Module], seeds: list[int]):
        self.heads = heads
        for head, seed in zip(heads, seeds):
            seed_dropout(head, seed)

    def parameters(self) -> list[tuple[torch.Tensor, bool]]:
        """Parameters, each with whether weight decay is for it: not for vectors, as in timm."""
        return [(p, p.ndim > 1) for head in self.heads for p in head.parameters()]

    def forward_train(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (M, B, C) in training mode."""
        return torch.stack([head.train()(x[i]) for i, head in enumerate(self.heads)])

    def forward_eval(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (M, N, C) in evaluation mode."""
        return torch.stack([head.eval()(x) for head in self.heads])

    def states(self) -> list[Named]:
        """State dict of each head; its tensors change with training."""
        return [head.state_dict() for head in self.heads]


class StackedHeads:
    """As `SeparateHeads`, all M in one go."""

    def __init__(self, heads: list[nn.Module], seeds: list[int]):
        self.generators = [seed_dropout(head, seed) for head, seed in zip(heads, seeds)]
        params, self.buffers = stack_module_state(heads)  # type: ignore[arg-type]
        # matrices lie transposed: the layout in which their gradients come, so that none is copied
        self.params = {
            name: (p.detach().mT.contiguous() if p.ndim == 3 else p.detach()).requires_grad_()
            for name, p in params.items()
        }
        self.template = heads[0]
        self.dropouts = [m for m in self.template.modules() if isinstance(m, SeededDropout)]
        self.vectors = {name for name, p in heads[0].named_parameters() if p.ndim <= 1}
        self._shapes: list[tuple[float, torch.Size]] | None = None

    def parameters(self) -> list[tuple[torch.Tensor, bool]]:
        """As `SeparateHeads.parameters`."""
        return [(p, name not in self.vectors) for name, p in self.params.items()]

    def forward_train(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (M, B, C) in training mode."""
        self.template.train()
        if self._shapes is None:
            self._shapes = self._record_shapes(x[0])
        masks = [
            draw_masks(p, (x.shape[1], *shape[1:]), self.generators).to(x.device) for p, shape in self._shapes
        ]
        return vmap(self._call)(self._named_params(), self.buffers, x, masks)

    def forward_eval(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (M, N, C) in evaluation mode."""
        self.template.eval()
        return vmap(self._call, in_dims=(0, 0, None, None))(self._named_params(), self.buffers, x, [])

    def states(self) -> list[Named]:
        """As `SeparateHeads.states`."""
        stacked = {**self._named_params(), **self.buffers}
        return [{name: value[i].detach() for name, value in stacked.items()} for i in range(len(self.generators))]

    def _named_params(self) -> Named:
        return {name: p.mT if p.ndim == 3 else p for name, p in self.params.items()}

    def _call(self, params: Named, buffers: Named, x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        feed = iter(masks)
        for dropout in self.dropouts:
            dropout.masks = feed
        return functional_call(self.template, (params, buffers), (x,))

    def _record_shapes(self, x: torch.Tensor) -> list[tuple[float, torch.Size]]:
        shapes: list[tuple[float, torch.Size]] = []
        for dropout in self.dropouts:
            dropout.shapes = shapes
        try:
            with torch.no_grad():
                first = {name: p[0] for name, p in self._named_params().items()}
                # copies: a training forward changes running statistics
                functional_call(self.template, (first, {n: b[0].clone() for n, b in self.buffers.items()}), (x,))
        finally:
            for dropout in self.dropouts:
                dropout.shapes = None
        return shapes


def can_stack(heads: list[nn.Module], seeds: list[int], x: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the stacked form of some heads computes what the heads compute.

    Outputs, gradients and buffers of one training step are compared. Heads that `torch.func` cannot follow, and those
    with random numbers from elsewhere than `nn.Dropout`, come out as False.

    Args:
        heads: Left unchanged.
        seeds: One for each head.
        x: A batch (M, B, ...).
    """
    stacked, separate = StackedHeads(copy.deepcopy(heads), seeds), SeparateHeads(copy.deepcopy(heads), seeds)
    try:
        with torch.random.fork_rng(devices=[]):
            found = [_one_step(group, x) for group in (stacked, separate)]
    except (RuntimeError, ValueError, StopIteration, NotImplementedError):
        return False
    pairs = zip(*found)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())) for a, b in pairs)


def _one_step(group: StackedHeads | SeparateHeads, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, gradients and buffers, each as one vector: gradients that vanish count against the others."""
    output = group.forward_train(x)
    output.square().mean(dim=(1, 2)).sum().backward()
    if isinstance(group, StackedHeads):
        gradients = [_gradient(p) for p in group.params.values()]
        gradients = [g.mT if g.ndim == 3 else g for g in gradients]
        buffers = list(group.buffers.values())
    else:
        named = [dict(head.named_parameters()) for head in group.heads]
        gradients = [torch.stack([_gradient(params[n]) for params in named]) for n in named[0]]
        kept = [dict(head.named_buffers()) for head in group.heads]
        buffers = [torch.stack([b[n] for b in kept]) for n in kept[0]]
    found = [output.detach()], gradients, buffers
    return [torch.cat([t.flatten().double() for t in tensors]) for tensors in found if tensors]


def _gradient(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
