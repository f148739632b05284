"""How often the collision of each IC convolution is active: the guard against dead branches (spec ic_networks_wld 2.5).

Where the share of positions with u = z - w'S + b1 > 0 is 0, ReLU(u) is 0 everywhere, gives no gradient to w', and the
layer trains as a plain convolution; where it is 1, the layer is linear.
"""

from typing import Any, Dict, Optional

import torch
from torch import nn

from ..layers import ICConv2d
from .recalibrate_bn import Batches, device_of, images_of


def ic_convs(model: nn.Module) -> Dict[str, ICConv2d]:
    """Its IC convolutions by name.

    Raises:
        ValueError: If there are none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, ICConv2d)}
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no IC convolution; make one by timm_spinal.convert_to_ic or by a name such as '
            'icresnet50.')
    return found


@torch.no_grad()
def ic_active_share(model: nn.Module, batches: Batches, count: Optional[int] = None) -> Dict[str, float]:
    """Share of active positions, over images, places and filters, of each IC convolution, in [0, 1].

    Args:
        model: In the mode in which it is looked at: a new one in train mode, where BatchNorm has what it needs; buffers
            are afterwards as before.
        batches: A loader, or a batch of images, on any device.
        count: Batches at most; all where None.

    Returns:
        The share by the layer's name, in the order of the model.

    Raises:
        ValueError: If the model has no IC convolution, or there is no batch.
    """
    sums: Dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            u = module.pre_sigma(*module.parts(args[0]))
            sums[name] = sums.get(name, 0) + torch.stack([(u > 0).sum(), torch.tensor(u.numel(), device=u.device)])
        return hook

    hooks = [conv.register_forward_hook(note(name)) for name, conv in ic_convs(model).items()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for images in images_of(batches, count, device_of(model)):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return {name: (active / total).item() for name, (active, total) in sums.items()}
