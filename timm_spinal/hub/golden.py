"""Golden tensors: inputs and what the published weights make of them, to compare with elsewhere."""
from typing import Any

import torch
from torch import nn

from timm_spinal.errors import UserError

GOLDEN = 'test/golden.safetensors'
BATCH = 2
TOLERANCE = 1e-4  # of the greatest value; float32 on another machine differs by about 1e-6 of it


@torch.no_grad()
def golden_tensors(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """What a model in eval mode makes of two fixed noise images.

    Args:
        model: On the CPU, in float32.
        input_size: (C, H, W).

    Returns:
        ``input`` (2, C, H, W), ``features`` of forward_features, ``pre_logits`` and ``logits``; those of them that
        the model gives as one tensor.
    """
    x = torch.randn(BATCH, *input_size, generator=torch.Generator().manual_seed(0))
    return dict(input=x, **_outputs(model, x))


def _outputs(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.eval()
    features = model.forward_features(x)
    found = dict(features=features, pre_logits=model.forward_head(features, pre_logits=True), logits=model(x))
    return {name: value.contiguous() for name, value in found.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def compare_golden(model: nn.Module, golden: dict[str, torch.Tensor], name: str) -> float:
    """The greatest difference between a model and golden tensors, as a part of the greatest golden value.

    Args:
        model: On the CPU, in float32.
        golden: As `golden_tensors` gives them.
        name: Of the model, for the message.

    Raises:
        UserError: A tensor has another shape or differs by more than ``TOLERANCE``.
    """
    if 'input' not in golden or 'logits' not in golden:
        raise UserError(f'{name}: {GOLDEN} contains no input and logits; publish it again with timm-spinal publish')
    found = _outputs(model, golden['input'])
    worst = 0.
    for key, expected in golden.items():
        if key == 'input':
            continue
        value = found.get(key)
        if value is None or value.shape != expected.shape:
            shape = 'none' if value is None else tuple(value.shape)
            raise UserError(f'{name}: {key} has shape {shape}, but {tuple(expected.shape)} in {GOLDEN}: these are not '
                            'the weights or the code that it was published with')
        difference = ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
        if not difference <= TOLERANCE:
            raise UserError(f'{name}: {key} differs from {GOLDEN} by {difference:.1e} of its greatest value (at most '
                            f'{TOLERANCE:.0e} is rounding): these are not the weights or the code that it was '
                            'published with')
        worst = max(worst, difference)
    return worst
