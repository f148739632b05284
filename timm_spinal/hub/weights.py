"""Weights as they are published: finite, each tensor once, float32 or float16."""
from typing import Mapping

import torch
from torch import nn

from timm_spinal.errors import UserError


def published_weights(state_dict: Mapping[str, torch.Tensor], dtype: str, name: str) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU; floating point ones in float32 or float16.

    Args:
        state_dict: The weights.
        dtype: 'fp32' or 'fp16'.
        name: Of the model, for messages.

    Raises:
        UserError: A value is NaN or infinite, or does not fit into float16.
    """
    wanted = torch.float16 if dtype == 'fp16' else torch.float32
    out = {}
    for key, value in state_dict.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            if not value.isfinite().all():
                raise UserError(f'{name}: {key} has NaN or infinite values; publish another checkpoint, or train with '
                                'a lower --lr')
            value = value.to(wanted)
            if not value.isfinite().all():
                raise UserError(f'{name}: {key} has values beyond the range of float16; publish it with --dtype fp32')
        out[key] = value.clone(memory_format=torch.contiguous_format)
    return out


def check_not_tied(model: nn.Module, name: str) -> None:
    """Refuse a model with one tensor under two names: timm cannot save it, and other readers drop one of them.

    Raises:
        UserError: Names the two.
    """
    seen: dict[int, str] = {}
    for key, value in model.state_dict().items():
        place = value.untyped_storage().data_ptr()
        if value.numel() and place:
            if place in seen:
                raise UserError(f'{name}: {seen[place]} and {key} are one tensor under two names, which safetensors '
                                'cannot store; register it once in the model')
            seen[place] = key
