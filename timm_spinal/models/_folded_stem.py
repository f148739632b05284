"""timm's ResNet stem with its norm folded into its convolution on the way, as the decomposed convolutions do theirs."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers.shared_basis_kernel import infers


class FoldedStem:
    """Mixed into a timm ResNet, in front of it in the method resolution order.

    In eval mode on the CPU, without gradients, the norm behind the first convolution, which has the largest map of the
    network, becomes part of its filters, 10,000 numbers. Where anything would notice (hooks, tracing, another norm or
    stem, training) the stem is timm's.
    """

    def forward_features(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
            x = self.layer4(x)
        return x

    def stem(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.folds_stem(x):
            x = self.folded_conv1(x)
        else:
            x = self.bn1(self.conv1(x))
        return self.maxpool(self.act1(x))

    @torch.jit.unused
    def folded_conv1(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The first convolution and its norm in one."""
        conv, norm = self.conv1, self.bn1
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @torch.jit.unused
    def folds_stem(self: Any, x: torch.Tensor) -> bool:
        """Whether the norm can be folded and nothing looks at what is between."""
        conv, norm = self.conv1, self.bn1
        known = type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and type(norm) is nn.BatchNorm2d
        if not known or self.training or norm.training or norm.running_var is None or not infers(x):
            return False
        return not any(module._forward_hooks or module._forward_pre_hooks for module in (conv, norm))
