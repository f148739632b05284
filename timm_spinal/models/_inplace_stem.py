"""timm's ResNet stem with its norm in place: the largest map of the network is written once less."""

from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import nn

from ..layers.shared_basis_kernel import infers, is_hooked


class InplaceStem:
    """Mixed into a timm ResNet, in front of it in the method resolution order.

    In eval mode on the CPU, without gradients, the norm behind the first convolution overwrites that one's output, with
    the same numbers. Where anything would notice (hooks, tracing, another norm or stem, training) the stem is timm's.
    """

    def forward_features(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        if not torch.jit.is_scripting() and self.norms_in_place(x):
            x = self.norm_in_place(x)
        else:
            x = self.bn1(x)
        x = self.maxpool(self.act1(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
            x = self.layer4(x)
        return x

    @torch.jit.unused
    def norm_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The first norm, where :meth:`norms_in_place`."""
        norm, unused = self.bn1, x.new_empty(0)
        torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0., norm.eps,
            out=(x, unused, x.new_empty(0)))
        return x

    @torch.jit.unused
    def norms_in_place(self: Any, x: torch.Tensor) -> bool:
        """Whether the first norm is an ordinary one and nothing else looks at what it reads, x, or writes."""
        conv, norm = self.conv1, self.bn1
        known = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
        if not known or self.training or norm.training or norm.running_var is None or not infers(x):
            return False
        same_type = norm.weight is not None and norm.weight.dtype == norm.running_var.dtype == x.dtype
        return same_type and not is_hooked(conv, norm)
