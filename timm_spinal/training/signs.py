"""How many signs of binary weights training changed.

A layer that xnorizes its weights in every forward, the projector of XnODR, has ``xnor_projector`` set. Its weights stay
floats in training; their signs and scales alone reach the output. A sign is +1 where the weight is above 0.
"""
import torch
import torch.nn as nn


def signs_of(model: nn.Module) -> torch.Tensor:
    """The signs of all binary weights of a model, one after the other, as booleans on the CPU: (W,)."""
    weights = [getattr(m, 'weight', None) for m in model.modules() if getattr(m, 'xnor_projector', False)]
    signs = [(w.detach() > 0).flatten().cpu() for w in weights if isinstance(w, nn.Parameter)]
    return torch.cat(signs) if signs else torch.zeros(0, dtype=torch.bool)


def changed_percent(before: torch.Tensor, model: nn.Module) -> float | None:
    """Percent of the binary weights of a model whose sign is another than before; None when it has none."""
    if not len(before):
        return None
    return 100. * (signs_of(model) != before).double().mean().item()
