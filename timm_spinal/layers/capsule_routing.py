"""Dynamic routing between capsules, with float or xnorized projector and agreement.

Papers: https://arxiv.org/abs/1710.09829 and https://arxiv.org/abs/2111.10854 (docs/papers/xnodr_xnidr.md,
sections 2 and 3).
"""

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import ContextManager, Tuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .capsule import float32_or_wider, mean_abs, sign_ste, squash, xnorize
from .classifier_head import check_positive

MEMORY_MODES = ('auto', 'whole', 'lean')
# elements of the prediction tensor (float32: 4 bytes each)
WHOLE_LIMIT = 2 ** 24  # 64 MiB; above it 'auto' chooses 'lean'
CHUNK_LIMIT = 2 ** 21  # 8 MiB, which a CPU's caches hold; the predictions that lean routing makes at a time
# the same on a GPU, where it counts how many kernels are started
GPU_WHOLE_PART = 1 / 16  # of the free memory; whole routing in training holds up to 8 tensors of this size, so half
GPU_CHUNK_LIMIT = 2 ** 27  # 512 MiB, so that chunks of whole classes have 256 MiB at least


def route_whole(
        x: torch.Tensor,
        weight: torch.Tensor,
        iterations: int,
        xnor_projector: bool,
        xnor_agreement: bool,
) -> torch.Tensor:
    """Routing that keeps all predictions u_hat (B, N, J, D); arguments as :func:`route_lean`."""
    return route_predictions(_predictions(x, weight, xnor_projector), iterations, xnor_agreement)


def route_predictions(u_hat: torch.Tensor, iterations: int, xnor_agreement: bool) -> torch.Tensor:
    """Predictions u_hat (B, N, J, D) -> class capsules v (B, J, D)."""
    coupling = torch.full_like(u_hat[..., 0], 1. / u_hat.shape[2])  # softmax of zeros
    logits = torch.zeros_like(coupling)
    v = squash(torch.einsum('bij,bijd->bjd', coupling, u_hat))
    for _ in range(iterations - 1):
        logits = logits + _agreement(u_hat, v, xnor_agreement)
        v = squash(torch.einsum('bij,bijd->bjd', logits.softmax(2), u_hat))
    return v


def route_lean(
        x: torch.Tensor,
        weight: torch.Tensor,
        iterations: int,
        xnor_projector: bool,
        xnor_agreement: bool,
        chunk: int,
) -> torch.Tensor:
    """Routing that makes the predictions of ``chunk`` classes at a time, again in every iteration, and stores none.

    Given the coupling coefficients, the classes do not depend on one another. What is kept is logits and coupling,
    (B, N, J) each; the backward pass makes each chunk's predictions once more.

    Args:
        x: Input capsules (B, N, d), already xnorized in XnODR.
        weight: W (N, J, d, D).
        iterations: Number r of routing iterations.
        xnor_projector: Xnorize W (XnODR).
        xnor_agreement: Xnorize the agreement (XnIDR).
        chunk: Classes at a time.

    Returns:
        Class capsules v (B, J, D).
    """
    weights = weight.split(chunk, 1)
    uniform = torch.full_like(x[..., :1], 1. / weight.shape[1])
    couplings = uniform.expand(-1, -1, weight.shape[1]).split(chunk, 2)
    logits = torch.zeros_like(uniform).repeat(1, 1, weight.shape[1])
    for _ in range(iterations - 1):
        if torch.jit.is_scripting() or torch.is_grad_enabled():
            logits = logits + torch.cat([
                _route_chunk(x, w, c, xnor_projector, xnor_agreement) for w, c in zip(weights, couplings)], 2)
        else:  # in place, so that there are no more than two tensors (B, N, J)
            for i, (w, c) in enumerate(zip(weights, couplings)):
                logits[:, :, i * chunk:(i + 1) * chunk] += _route_chunk(x, w, c, xnor_projector, xnor_agreement)
            couplings = uniform.split(1, 2)  # frees the old ones
        couplings = logits.softmax(2).split(chunk, 2)
    return torch.cat([
        _route_chunk(x, w, c, xnor_projector, xnor_agreement, last=True) for w, c in zip(weights, couplings)], 1)


def _agreement(u_hat: torch.Tensor, v: torch.Tensor, xnor: bool) -> torch.Tensor:
    """<u_hat, v> over D; xnorized <sgn u_hat, sgn v> K_u K_v: (B, N, J, D), (B, J, D) -> (B, N, J)."""
    if not xnor:
        return torch.einsum('bijd,bjd->bij', u_hat, v)
    same = torch.einsum('bijd,bjd->bij', sign_ste(u_hat), sign_ste(v))
    return same * mean_abs(u_hat, 3).squeeze(3) * mean_abs(v, 2).squeeze(2).unsqueeze(1)


def _predictions(x: torch.Tensor, weight: torch.Tensor, xnor: bool) -> torch.Tensor:
    """u_hat: (B, N, d), (N, J, d, D) -> (B, N, J, D)."""
    return torch.einsum('bik,ijkd->bijd', x, xnorize(weight, 2) if xnor else weight)


def _compute_chunk(
        x: torch.Tensor,
        weight: torch.Tensor,
        coupling: torch.Tensor,
        xnor_projector: bool,
        xnor_agreement: bool,
        last: bool = False,
) -> torch.Tensor:
    """One iteration for some classes j: v (B, j, D) in the last one, before that its agreement (B, N, j)."""
    u_hat = _predictions(x, weight, xnor_projector)
    v = squash(torch.einsum('bij,bijd->bjd', coupling, u_hat))
    return v if last else _agreement(u_hat, v, xnor_agreement)


def _route_chunk(
        x: torch.Tensor,
        weight: torch.Tensor,
        coupling: torch.Tensor,
        xnor_projector: bool,
        xnor_agreement: bool,
        last: bool = False,
) -> torch.Tensor:
    """:func:`_compute_chunk`, computed once more in the backward pass, so that its predictions are not kept."""
    if not torch.jit.is_scripting() and torch.is_grad_enabled():
        return checkpoint(
            _compute_chunk, x, weight, coupling, xnor_projector, xnor_agreement, last,
            use_reentrant=False, preserve_rng_state=False)
    return _compute_chunk(x, weight, coupling, xnor_projector, xnor_agreement, last)


def classes_per_chunk(
        batch: int,
        capsules: int,
        classes: int,
        dim: int,
        memory: str,
        whole_limit: int = WHOLE_LIMIT,
        chunk_limit: int = CHUNK_LIMIT,
) -> int:
    """Classes that routing handles at a time; 0 for routing that keeps all predictions."""
    if memory == 'whole' or (memory == 'auto' and batch * capsules * classes * dim <= whole_limit):
        return 0
    rows = max(batch, 8)  # below that the chunk's part of W is larger than its predictions
    return max(1, min(classes, chunk_limit // (rows * capsules * dim)))


@lru_cache
def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU when first asked, down to a power of two: a resumed run then decides as before."""
    if not torch.cuda.is_available():
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return 2 ** int(math.log2(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)))


@torch.compiler.assume_constant_result
def limits(device: torch.device) -> Tuple[int, int]:
    """Elements of the predictions up to which 'auto' keeps all of them on a device, and those of a chunk."""
    if device.type != 'cuda':
        return WHOLE_LIMIT, CHUNK_LIMIT
    return max(GPU_CHUNK_LIMIT, int(GPU_WHOLE_PART * _free_memory(device)) // 4), GPU_CHUNK_LIMIT


def compiled_batch(device: torch.device) -> int:
    """The batch size for which a compiled or exported model chooses, since its own may vary."""
    return 256 if device.type == 'cuda' else 32


def without_autocast(x: torch.Tensor) -> ContextManager:
    device = x.device.type
    # a meta tensor has no autocast; older releases cannot compile torch.amp.is_autocast_available
    if not x.is_meta and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _route(
        x: torch.Tensor,
        weight: torch.Tensor,
        iterations: int,
        xnor_projector: bool,
        xnor_agreement: bool,
        chunk: int,
) -> torch.Tensor:
    out_dtype = weight.dtype  # not that of x: under autocast that is float16, for which v may be too small
    capsules, weight = float32_or_wider(x), float32_or_wider(weight)
    if xnor_projector:
        capsules = xnorize(capsules, 2)
    if chunk == 0:
        return route_whole(capsules, weight, iterations, xnor_projector, xnor_agreement).to(out_dtype)
    return route_lean(capsules, weight, iterations, xnor_projector, xnor_agreement, chunk).to(out_dtype)


def dynamic_routing(
        x: torch.Tensor,
        weight: torch.Tensor,
        iterations: int = 3,
        xnor_projector: bool = False,
        xnor_agreement: bool = False,
        memory: str = 'auto',
) -> torch.Tensor:
    """Input capsules (B, N, d), W (N, J, d, D) -> class capsules v (B, J, D).

    Computed in float32 or wider, also under autocast, and returned in the type of W. See :class:`CapsuleRouting`
    for the arguments and the equations.
    """
    capsules, classes, _, dim = weight.shape
    if torch.jit.is_scripting():
        chunk = classes_per_chunk(x.shape[0], capsules, classes, dim, memory)
        return _route(x, weight, iterations, xnor_projector, xnor_agreement, chunk)
    else:
        batch = x.shape[0]
        if torch.compiler.is_compiling():
            batch = compiled_batch(x.device)
        chunk = classes_per_chunk(batch, capsules, classes, dim, memory, *limits(x.device))
        with without_autocast(x):
            return _route(x, weight, iterations, xnor_projector, xnor_agreement, chunk)


torch.fx.wrap('dynamic_routing')  # it chooses by the size of its input, which tracing does not know


def check_routed_classes(num_classes: int) -> None:
    """Raise ValueError for a single class."""
    if num_classes == 1:
        raise ValueError(
            'A capsule layer routes between classes and needs at least 2, got num_classes 1; '
            "use 2 classes, or the head 'linear' for one score.")


class CapsuleRouting(nn.Module):
    """Fully connected capsule layer: (B, N, d) -> (B, J, D), no bias (docs/papers/xnodr_xnidr.md, sections 2 and 3)::

        u_hat[b,i,j] = x[b,i] W[i,j]                         XnODR: (sgn x)(sgn W) K_x[b,i] alpha_W[i,j]
        l[b,i,j] = 0
        r times:
            c[b,i] = softmax over j of l[b,i]
            v[b,j] = squash(sum_i c[b,i,j] u_hat[b,i,j])
            l[b,i,j] += <u_hat[b,i,j], v[b,j]>               XnIDR: <sgn u_hat, sgn v> K_u[b,i,j] K_v[b,j]

    K_x and alpha_W are means of |.| over d, K_u and K_v over D, all without gradient. The last update of l is left
    out, since nothing reads it. The gradient goes through all iterations. W starts Glorot-uniform by Keras' rule for
    four axes, which counts N J as the receptive field: limit sqrt(6 / (N J (d + D))).

    Args:
        in_capsules: Number N of input capsules.
        in_dim: Their dimension d.
        num_classes: Number J of class capsules, at least 2.
        class_dim: Their dimension D.
        iterations: Number r of routing iterations.
        xnor_projector: Binarise x and W (XnODR).
        xnor_agreement: Binarise u_hat and v in the agreement (XnIDR).
        memory: 'whole' keeps the predictions (B, N, J, D); 'lean' makes them in chunks of classes, again in the
            backward pass, and keeps (B, N, J). Both give the same. 'auto' is lean above 2 ** 24 predictions, on a
            CUDA device where they take more than a sixteenth of the memory that is free at the first call. In compiled
            and exported models it decides as for a batch of 32, on CUDA of 256.

    Raises:
        ValueError: A size out of range, or an unknown ``memory``.
    """

    def __init__(
            self,
            in_capsules: int,
            in_dim: int,
            num_classes: int,
            class_dim: int = 16,
            iterations: int = 3,
            xnor_projector: bool = False,
            xnor_agreement: bool = False,
            memory: str = 'auto',
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_positive(
            capsules=in_capsules, capsule_dim=in_dim, num_classes=num_classes, class_dim=class_dim,
            iterations=iterations)
        check_routed_classes(num_classes)
        if memory not in MEMORY_MODES:
            raise ValueError(f"Unknown memory '{memory}'; use {', '.join(MEMORY_MODES)}.")
        self.in_capsules, self.in_dim = in_capsules, in_dim
        self.out_features, self.class_dim = num_classes, class_dim
        self.iterations = iterations
        self.xnor_projector, self.xnor_agreement = xnor_projector, xnor_agreement
        self.memory = memory
        self.weight = nn.Parameter(torch.empty(in_capsules, num_classes, in_dim, class_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        limit = math.sqrt(6. / (self.in_capsules * self.out_features * (self.in_dim + self.class_dim)))
        nn.init.uniform_(self.weight, -limit, limit)

    def extra_repr(self) -> str:
        return (f'{self.in_capsules} x {self.in_dim} -> {self.out_features} x {self.class_dim}, '
                f'iterations={self.iterations}, xnor_projector={self.xnor_projector}, '
                f'xnor_agreement={self.xnor_agreement}, memory={self.memory}')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dynamic_routing(
            x, self.weight, self.iterations, self.xnor_projector, self.xnor_agreement, self.memory)
