"""The orthogonality penalty on shared filter bases.

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066 (docs/papers/shared_bases.md, section 4).
"""

from typing import Iterable, List, NamedTuple, Sequence

import torch

from .shared_basis import SharedBasisConv2d
from .shared_stage import SharedStage

MODES = ('official', 'stage')


class GramError(NamedTuple):
    """Entries of (M M^T - I)^2 that the penalty counts, for a matrix M of n filters of m numbers each."""

    total: torch.Tensor  # their sum, without the floor
    floor: int  # n - m where n > m: no such M gets below it
    entries: int
    rank: int


def gram_error(rows: torch.Tensor) -> torch.Tensor:
    """||M M^T - I||^2 of a matrix M (n, m), less its floor: that makes it the same for M and its transpose."""
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return (gram - torch.eye(len(gram), device=gram.device)).square().sum()


def stage_errors(stage: SharedStage, with_unique: bool = False) -> List[GramError]:
    """What is counted in one stage: one matrix, or two of filters that are not of one size.

    Args:
        stage: A stage.
        with_unique: Count the unique filters as well: every shared row with all rows, and unique rows with those of the
            same convolution.
    """
    shared = [basis.flatten(1).float() for basis in stage.bases()]
    if len({rows.shape[1] for rows in shared}) == 1:
        shared = [torch.cat(shared)]
    errors = [GramError(gram_error(m), max(len(m) - m.shape[1], 0), len(m) ** 2, min(m.shape)) for m in shared]
    if with_unique:
        (total, floor, entries, rank), (rows,) = errors[0], shared
        convs = [module for module in stage.modules() if isinstance(module, SharedBasisConv2d)]
        for filters in [conv.unique.flatten(1).float() for conv in convs if conv.unique is not None]:
            total = total + (rows @ filters.T).square().sum() + gram_error(filters)
            entries += len(rows) * len(filters) + len(filters) ** 2
            rank += len(filters)
        return [GramError(total, floor, entries, rank)]
    return errors


def orthogonality_loss(
        stages: Iterable[SharedStage],
        mode: str = 'official',
        with_unique: bool = False,
) -> torch.Tensor:
    """How far the shared filters of a network are from orthonormal, computed in float32: a scalar, 0 at best.

    ``official``: the mean of the counted entries of (M M^T - I)^2 over all stages together
    (docs/papers/shared_bases.md, section 4). It cannot get below (n - m) / n^2 for n filters of m < n numbers. The mean
    dilutes the penalty's weight lambda: with weight decay wd and N entries, rows settle at a squared norm of 1 - wd N /
    (4 lambda), and where that is negative weight decay wins (docs/papers/shared_bases.md, section 4). Filters of two
    sizes, as in the "++" forms, are two means.

    ``stage``: the sum over the stages of ||M M^T - I||^2 / n, n the rank of M, 0 at best. The squared norm is then
    1 - wd n / (4 lambda), close to 1 at any size. Without the division lambda = 10 and a learning rate of 0.1 diverge.

    Args:
        stages: The stages that share filters.
        mode: 'official' or 'stage'.
        with_unique: Count the unique filters too, as the paper's code does on CIFAR-10 alone.

    Raises:
        ValueError: An unknown mode, or no shared filters.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown mode '{mode}' of orthogonality; known are {' and '.join(MODES)}.")
    sharing = [stage for stage in stages if stage.bases()]
    if not sharing:
        raise ValueError('The model has no shared filters (S0), so there is nothing to keep orthogonal.')
    with torch.autocast(sharing[0].bases()[0].device.type, enabled=False):
        errors = [stage_errors(stage, with_unique) for stage in sharing]
        if mode == 'stage':
            return torch.stack([error.total / error.rank for kinds in errors for error in kinds]).sum()
        return torch.stack([_pooled_mean(stage_by_stage) for stage_by_stage in zip(*errors)]).sum()


def _pooled_mean(errors: Sequence[GramError]) -> torch.Tensor:
    total = torch.stack([error.total + error.floor for error in errors]).sum()
    return total / sum(error.entries for error in errors)
