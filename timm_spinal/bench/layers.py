"""Single layers as sides of a comparison: capsule routing whole or in chunks, and capsule heads in floats or bits."""
from typing import Any

import torch
from torch import nn

from timm_spinal.layers import create_head, dynamic_routing

from .runner import Call, Setting

ROUTING = {'caps': (False, False), 'xnodr': (True, False), 'xnidr': (False, True)}  # what of routing is xnorized
CAPSULES, IN_DIM, CLASS_DIM, ITERATIONS = 128, 8, 16, 3


def routing_call(setting: Setting, layer: str, classes: int, memory: str, train: bool) -> Call:
    """Dynamic routing from 128 capsules to the capsules of so many classes.

    Args:
        setting: Its batch size counts.
        layer: Of `ROUTING`.
        classes: Class capsules.
        memory: ``whole`` keeps all predictions, ``lean`` makes them in chunks.
        train: With the backward pass.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch_size, CAPSULES, IN_DIM, generator=generator).relu().to(setting.device)
    weight = 0.1 * torch.randn(CAPSULES, classes, IN_DIM, CLASS_DIM, generator=generator).to(setting.device)
    x.requires_grad_(train)
    weight.requires_grad_(train)

    def call() -> tuple[torch.Tensor, ...]:
        x.grad = weight.grad = None
        v = dynamic_routing(x, weight, ITERATIONS, *ROUTING[layer], memory)
        if not train:
            return (v,)
        v.square().sum().backward()
        assert x.grad is not None and weight.grad is not None
        return v.detach(), x.grad, weight.grad

    return call


@torch.inference_mode()
def head_call(setting: Setting, layer: str, classes: int, packed: bool) -> Call:
    """A capsule head with 128 capsules on a map of 7 x 7, in floats or packed."""
    head: Any = create_head(layer, 1280, classes, primary='depthwise', capsules=CAPSULES).eval()
    nn.init.normal_(head.fc.weight, 0., 0.1, generator=torch.Generator().manual_seed(0))  # as training makes them
    if packed:
        head.pack()
    x = torch.randn(setting.batch_size, 1280, 7, 7, generator=torch.Generator().manual_seed(1))
    return torch.inference_mode()(lambda: head(x))
