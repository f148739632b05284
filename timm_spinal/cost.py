"""What a model costs: parameters, multiply-accumulates, activations."""
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
_COUNTED = {_aten.convolution, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}


class Cost(NamedTuple):
    """Of one image of size ``input_size`` (C, H, W).

    Attributes:
        params: Parameters, each counted once.
        macs: Multiply-accumulates of convolutions and matrix products, as torch.utils.flop_counter counts them;
            elementwise work such as routing's normalisations is not in it.
        activations: Outputs of the same operations, as timm's cards count them.
    """
    params: int
    macs: int
    activations: int
    input_size: tuple[int, int, int]


class _ActivationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, 'overloadpacket', None) in _COUNTED:
            self.total += out.numel()
        return out


def count_params(model: nn.Module) -> int:
    """Parameters, each counted once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of one forward: half the FLOPs that torch.utils.flop_counter counts."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


@torch.no_grad()
def cost_of(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count what one image costs; the model is left in eval mode."""
    x = torch.zeros(1, *input_size)
    with FlopCounterMode(display=False) as flops, _ActivationCounter() as activations:
        model.eval()(x)
    return Cost(count_params(model), flops.get_total_flops() // 2, activations.total, input_size)
