"""Penalties on weights: `objective.PENALTIES` names them, the loop adds each once per update."""
from typing import Callable

import torch
import torch.nn as nn

from timm_spinal.errors import UserError

from .config import TrainConfig

Penalty = Callable[[], torch.Tensor]


def orthogonality(config: TrainConfig, model: nn.Module) -> Penalty | None:
    """``sb_ortho`` times the distance of a model's shared filter bases from orthonormal (spec shared_basis 2).

    Raises:
        UserError: The model shares no filters.
    """
    if not config.sb_ortho:
        return None
    distance = getattr(model, 'orthogonality_loss', None)
    if distance is None:
        raise UserError(f'--sb-ortho {config.sb_ortho:g}: {config.model} has no shared filter bases; take a model such '
                        'as resnet34_sb_s48u1d, or leave it out')
    try:
        distance(config.sb_ortho_mode)
    except ValueError as e:
        raise UserError(f'--sb-ortho {config.sb_ortho:g}: {e} Leave it out') from e
    return lambda: config.sb_ortho * distance(config.sb_ortho_mode)
