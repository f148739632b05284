"""The capsule layers of XnODR and XnIDR in the form for inference, with bits in place of floats.

Packing is for CPUs, where C code computes with the bits, and for the size of files: on a GPU the float layer is faster.

Paper: https://arxiv.org/abs/2111.10854 (docs/papers/xnodr_xnidr.md, sections 3 and 5). The file format is ours.
"""

from typing import Any, Dict

import torch
from torch import nn

from .capsule_routing import CapsuleRouting
from .xnor import can_run, pack_signs, xnor_backend
from .xnor.torch_twin import unpack_signs

XNODR_STATE = ('bits', 'scale')
XNIDR_STATE = ('projector',)


class PackedRouting(nn.Module):
    """A capsule layer for inference, (B, N, d) -> (B, J, D), that gives what the float layer does.

    A program exported from it needs ``import timm_spinal`` in the process that loads it, which registers the operators.

    Args:
        routing: The float layer, which stays as it is.
    """

    def __init__(self, routing: CapsuleRouting):
        super().__init__()
        self.in_capsules, self.in_dim = routing.in_capsules, routing.in_dim
        self.out_features, self.class_dim = routing.out_features, routing.class_dim
        self.iterations = routing.iterations

    def float_weight(self) -> torch.Tensor:
        """W (N, J, d, D), as far as the packed form has kept it."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (f'{self.in_capsules} x {self.in_dim} -> {self.out_features} x {self.class_dim}, '
                f'iterations={self.iterations}')


class PackedXnodr(PackedRouting):
    """XnODR with a bit for each weight, ``bits`` (N, ceil(d / 8), J, D), and alpha as ``scale`` (N, J, D).

    That is 6.4 times less than the float weights with d = 8; not 32 times, since there is an alpha for 8 weights.
    Predictions are computed with XOR and popcount, again in every iteration, and are not stored.
    """

    bits: torch.Tensor
    scale: torch.Tensor

    def __init__(self, routing: CapsuleRouting):
        super().__init__(routing)
        bits, scale = pack_signs(routing.weight.detach())
        self.register_buffer('bits', bits)
        self.register_buffer('scale', scale)

    def float_weight(self) -> torch.Tensor:
        return unpack_signs(self.bits, self.scale, self.in_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.timm_spinal.xnodr_routing(x, self.bits, self.scale, self.iterations)


class PackedXnidr(PackedRouting):
    """XnIDR with an agreement by XOR and popcount; the weights stay floats, as ``projector`` (N, d, J, D)."""

    projector: torch.Tensor

    def __init__(self, routing: CapsuleRouting):
        super().__init__(routing)
        self.register_buffer('projector', routing.weight.detach().transpose(1, 2).contiguous())

    def float_weight(self) -> torch.Tensor:
        return self.projector.transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.timm_spinal.xnidr_routing(x, self.projector, self.iterations)


def pack_routing(routing: CapsuleRouting) -> PackedRouting:
    """The packed form of an XnODR or XnIDR layer.

    Raises:
        ValueError: A layer without binary product, or with two.
    """
    if routing.xnor_projector == routing.xnor_agreement:
        raise ValueError("Only a layer with one binarised product can be packed; use the head 'xnodr' or 'xnidr'.")
    return PackedXnodr(routing) if routing.xnor_projector else PackedXnidr(routing)


def xnor_implementation(model: nn.Module) -> Dict[str, str]:
    """What computes the binary products of a model on its present device.

    Returns:
        ``{'xnor': name}``, the name 'c-avx2', 'c-neon', 'c-portable' or 'torch', which float layers always use; empty
        for a model without such layers.
    """
    names = set()
    for module in model.modules():
        if isinstance(module, CapsuleRouting) and (module.xnor_projector or module.xnor_agreement):
            names.add('torch')
        elif isinstance(module, PackedRouting):
            weights = next(buffer for buffer in module.buffers() if buffer.is_floating_point())
            names.add(f'c-{xnor_backend()}' if can_run(weights, weights, module.class_dim) else 'torch')
    return {'xnor': ', '.join(sorted(names))} if names else {}


def check_packed_state(state_dict: Dict[str, Any], prefix: str, packed: bool, num_classes: int) -> None:
    """Refuse weights of the other form, and packed ones of other classes, before anything is loaded.

    Args:
        state_dict: Any weights.
        prefix: Name of the capsule layer in them, with a dot.
        packed: Whether the layer that will be loaded is packed.
        num_classes: Its classes.

    Raises:
        ValueError: The reason and the fix in one line.
    """
    names = [name for name in (*XNODR_STATE, *XNIDR_STATE) if f'{prefix}{name}' in state_dict]
    if packed and f'{prefix}weight' in state_dict:
        raise ValueError(
            f'{prefix}weight: float capsule weights do not fit a packed model; create it without head_packed, load '
            'them, then call timm_spinal.pack_xnodr(model).')
    if not names:
        return
    name, classes = f'{prefix}{names[0]}', state_dict[f'{prefix}{names[0]}'].shape[2]
    if not packed:
        raise ValueError(
            f'{name}: packed capsule weights do not fit a float model; create it with head_packed=True, or load the '
            'float weights that they were packed from.')
    if classes != num_classes:
        raise ValueError(
            f'{name}: the packed weights are for {classes} classes, the model has {num_classes}; create it with '
            f'num_classes={classes}, or train the float model for {num_classes} classes and pack that.')
