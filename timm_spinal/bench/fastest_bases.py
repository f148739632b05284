"""Which form of each stage with a shared filter basis is the faster one, by measuring it (spec shared_basis 8.2).

    from timm_spinal.bench.fastest_bases import fastest_bases
    model, forms = fastest_bases(model.eval(), images)
"""

from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import nn

from ..models import fold_bases, merge_bases
from .timing import Ratio, paired_ratio, paired_times


class StageForm(NamedTuple):
    """Time of a folded stage over that of the merged one, and which of the two is taken."""

    folded_to_merged: Ratio
    form: str  # 'folded' or 'merged'


@torch.inference_mode()
def fastest_bases(model: nn.Module, images: torch.Tensor, rounds: int = 20) -> Tuple[nn.Module, Dict[str, StageForm]]:
    """The model with every stage in the form that is faster for such images, on their device.

    All decomposed convolutions of a stage have one shape, so what holds for one of them holds for the stage.

    Args:
        model: A model with decomposed convolutions, in eval mode; it stays as it is.
        images: A batch as the model will get, in its memory format.
        rounds: Pairs of calls per stage.

    Returns:
        The model, a plain one if all stages are merged, and what was measured of each stage.

    Raises:
        ValueError: As :func:`timm_spinal.merge_bases`.
    """
    folded: Any = fold_bases(model)
    merged = merge_bases(folded)
    inputs = _stage_inputs(folded, images)
    forms = {}
    for name, x in inputs.items():
        sides = [_call(net.get_submodule(name), x) for net in (folded, merged)]
        ratio = paired_ratio(*paired_times(*sides, rounds=rounds))
        forms[name] = StageForm(ratio, 'merged' if ratio.median > 1. else 'folded')
    chosen = [name for name, form in forms.items() if form.form == 'merged']
    return (merge_bases(folded, chosen) if chosen else folded), forms


def _call(module: nn.Module, x: torch.Tensor) -> Any:
    def run() -> None:
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def _stage_inputs(model: Any, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """What each sharing stage gets."""
    inputs: Dict[str, torch.Tensor] = {}
    hooks: List[Any] = []
    for name, stage in model.shared_stages().items():
        def keep(module: nn.Module, args: Tuple[torch.Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0]

        hooks.append(stage.register_forward_pre_hook(keep))
    model(images)
    for hook in hooks:
        hook.remove()
    return inputs
