"""Linear layers that read the frozen features themselves: no gradient is computed for what no weight has made.

In a head on cached features most of the multiplications of the backward pass are gradients of the features, which
nothing uses. Where a layer reads them joined with hidden outputs, torch computes them all the same.
"""
import copy
from typing import Any

import torch
from torch import nn


class _FeatureLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, skip: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.skip = skip
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            grad_x[:, :ctx.skip] = 0.
            torch.mm(grad, weight[:, ctx.skip:], out=grad_x[:, ctx.skip:])
        return grad_x, grad.t() @ x, grad.sum(dim=0), None


class FeatureLinear(nn.Linear):
    """`nn.Linear` on (N, F) that gives the first ``skip`` numbers of its input a gradient of zero."""

    skip = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FeatureLinear.apply(x, self.weight, self.bias, self.skip)


def count_feature_columns(head: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Leading numbers of each linear layer's input that no parameter of the head has made, by the layer's name.

    They are the numbers that are still finite where every parameter is NaN.

    Args:
        head: Left unchanged.
        x: Some features, (N, F).
    """
    head = copy.deepcopy(head).eval()
    found: dict[str, int] = {}
    for name, module in head.named_modules():
        if type(module) is nn.Linear:
            def hook(module: nn.Module, inputs: Any, name: str = name) -> None:
                clean = ~inputs[0].isnan().flatten(0, -2).any(dim=0)
                found[name] = int(clean.cumprod(0).sum()) if inputs[0].ndim == 2 else 0
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for p in head.parameters():
            p.fill_(float('nan'))
        head(x)
    return found


def skip_feature_gradients(head: nn.Module, x: torch.Tensor) -> None:
    """Make the linear layers of a head, in place, `FeatureLinear` ones; gradients of the parameters stay the same.

    Args:
        head: Head on features that need no gradient.
        x: Some of the features, (N, F).
    """
    for name, skip in count_feature_columns(head, x).items():
        module = head.get_submodule(name)
        if skip and module.bias is not None:
            module.__class__ = FeatureLinear  # keeps parameters and hooks
            module.skip = skip  # type: ignore[assignment]
