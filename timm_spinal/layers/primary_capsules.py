"""From a feature map to primary capsules (docs/papers/xnodr_xnidr.md, section 4)."""

from typing import Dict, Type

import torch
from torch import nn

from .capsule import squash
from .classifier_head import check_positive

BN_EPS = 1e-3  # Keras' defaults, which the authors keep
BN_MOMENTUM = 0.01

torch.fx.wrap('squash')  # it branches on the type of its input


class DepthwisePrimary(nn.Module):
    """MobileNetV2's block: 3x3 depthwise conv, BN, 1x1 conv, average pool: (B, C, H, W) -> (B, F).

    The last two are linear with nothing between, so pooling first gives the same with H W times fewer
    multiply-accumulates in the 1x1 conv.

    Args:
        in_features: Channels C.
        out_features: Width F.
        pool_first: Pool in front of the 1x1 conv; False for the authors' order.
        momentum: BN momentum.
        eps: BN epsilon.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            pool_first: bool,
            momentum: float,
            eps: float,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.pool_first = pool_first
        self.conv_dw = nn.Conv2d(in_features, in_features, 3, padding=1, groups=in_features, **dd)
        self.norm = nn.BatchNorm2d(in_features, eps, momentum, **dd)
        self.conv_pw = nn.Conv2d(in_features, out_features, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv_dw(x))
        if self.pool_first:
            x = x.mean((2, 3), keepdim=True)
        return self.conv_pw(x).mean((2, 3))


class BottleneckPrimary(nn.Module):
    """ResNet's block: residual bottleneck without a ReLU at its end, average pool: (B, C, H, W) -> (B, C).

    Pooling first, in front of the last 1x1 conv, is exact while its BN uses stored statistics; while that BN uses those
    of the batch, which it takes over the map, the order is the authors' whatever ``pool_first`` says.

    Args:
        in_features: Channels C; the bottleneck has C / 4.
        out_features: Must be C.
        pool_first: Pool in front of the last 1x1 conv; False for the authors' order.
        momentum: BN momentum.
        eps: BN epsilon.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            pool_first: bool,
            momentum: float,
            eps: float,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        width = max(1, in_features // 4)
        self.pool_first = pool_first
        self.conv1 = nn.Conv2d(in_features, width, 1, **dd)
        self.norm1 = nn.BatchNorm2d(width, eps, momentum, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(width, eps, momentum, **dd)
        self.conv3 = nn.Conv2d(width, out_features, 1, **dd)
        self.norm3 = nn.BatchNorm2d(out_features, eps, momentum, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        if self.pool_first and not self.norm3.training:
            x, shortcut = x.mean((2, 3), keepdim=True), shortcut.mean((2, 3), keepdim=True)
        return (self.norm3(self.conv3(x)) + shortcut).mean((2, 3))


class TokenPrimary(nn.Module):
    """One linear for every token: (B, T, C) -> (B, T d), a capsule of each token (ours, not the papers').

    Args:
        in_features: Channels C.
        dim: Capsule dimension d.
    """

    def __init__(self, in_features: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(in_features, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(1)


BLOCKS: Dict[str, Type[nn.Module]] = {'depthwise': DepthwisePrimary, 'bottleneck': BottleneckPrimary}
VECTOR, TOKENS = 'vector', 'tokens'
PRIMARY = (*BLOCKS, VECTOR, TOKENS)


class PrimaryCapsules(nn.Module):
    """Map (B, C, H, W), tokens (B, T, C) or vector (B, C) -> primary capsules, one after the other: (B, N d), all >= 0.

    Block, cut into N capsules of d neighbouring channels, squash, BN over the capsule axis (d scales and shifts, shared
    by all capsules; statistics over batch and capsules), ReLU.

    Args:
        in_features: Channels C.
        block: 'depthwise' (MobileNetV2), 'bottleneck' (ResNet), 'vector': a pooled vector is cut as it is, or 'tokens':
            a linear makes a capsule of each token.
        capsules: Number N. With 'tokens' the number T of tokens, otherwise 0 for 128 with 'depthwise' and C / d with
            the others, where N d must be C.
        dim: Capsule dimension d.
        pool_first: Order of pooling in the block; both give the same.
        momentum: BN momentum.
        eps: BN epsilon.

    Raises:
        ValueError: An unknown block, or capsules that do not divide the channels.
    """

    def __init__(
            self,
            in_features: int,
            block: str = 'depthwise',
            capsules: int = 0,
            dim: int = 8,
            pool_first: bool = True,
            momentum: float = BN_MOMENTUM,
            eps: float = BN_EPS,
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_positive(in_features=in_features, capsule_dim=dim)
        if block not in PRIMARY:
            raise ValueError(f"Unknown primary block '{block}'; use {', '.join(PRIMARY)}.")
        if not capsules and block != TOKENS:
            capsules = 128 if block == 'depthwise' else max(1, in_features // dim)
        check_positive(capsules=capsules)
        if block not in ('depthwise', TOKENS) and capsules * dim != in_features:
            fix = f'use capsules={in_features // dim}' if in_features % dim == 0 else 'choose another capsule_dim'
            other = ' or pool them' if block == VECTOR else ", or primary='depthwise', which takes any number"
            raise ValueError(
                f'{capsules} capsules of dimension {dim} do not divide the {in_features} channels; {fix}{other}.')
        dd = {'device': device, 'dtype': dtype}
        self.capsules, self.dim = capsules, dim
        self.out_features = capsules * dim
        self.block: nn.Module = nn.Identity()
        if block == TOKENS:
            self.block = TokenPrimary(in_features, dim, **dd)
        elif block != VECTOR:
            self.block = BLOCKS[block](in_features, self.out_features, pool_first, momentum, eps, **dd)
        for module in self.block.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.norm = nn.BatchNorm1d(dim, eps, momentum, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = squash(self.block(x).unflatten(1, (self.capsules, self.dim)))
        x = self.norm(x.flatten(0, 1)).relu()
        return x.view(-1, self.out_features)
