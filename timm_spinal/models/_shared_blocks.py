"""timm's residual blocks with shared filters, and the stages made of them."""

from typing import Any, Dict, List, Optional, Sequence, Type

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..layers import SharedBasisConv2d, SharedConv2d, SharedStage, check_ranks
from ._timm import InvertedResidual


class SharedBasicBlock(BasicBlock):
    """timm's BasicBlock, both 3x3 convolutions with their norms decomposed over the stage's basis.

    See docs/papers/shared_bases.md, section 2.
    """

    def zero_init_last(self) -> None:
        norm: Any = self.conv2.norm
        if norm is not None:
            nn.init.zeros_(norm.weight)

    def forward(  # type: ignore[override]
            self,
            x: torch.Tensor,
            basis: Optional[torch.Tensor],
            basis2: Optional[torch.Tensor],
    ) -> torch.Tensor:
        shortcut = x
        x = self.conv1(x, basis)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.conv2(x, basis2)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act2(x)


class SharedBottleneck(Bottleneck):
    """timm's Bottleneck with the stage's 3x3 filters, and with its 1x1 expansion where that is shared.

    See docs/papers/shared_bases.md, section 3.
    """

    def forward(  # type: ignore[override]
            self,
            x: torch.Tensor,
            basis: torch.Tensor,
            basis2: torch.Tensor,
    ) -> torch.Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x, basis)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        if isinstance(self.conv3, SharedConv2d):
            x = self.conv3(x, basis2)
        else:
            x = self.conv3(x)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act3(x)


class SharedInvertedResidual(InvertedResidual):
    """timm's inverted residual with the stage's 1x1 expansion, and with its projection where that is shared (1.6)."""

    def forward(  # type: ignore[override]
            self,
            x: torch.Tensor,
            basis: torch.Tensor,
            basis2: torch.Tensor,
    ) -> torch.Tensor:
        shortcut = x
        x = self.conv_pw(x, basis)
        x = self.bn1(x)
        x = self.conv_dw(x)
        x = self.bn2(x)
        x = self.se(x)
        if isinstance(self.conv_pwl, SharedConv2d):
            x = self.conv_pwl(x, basis2)
        else:
            x = self.conv_pwl(x)
        x = self.bn3(x)
        return self.drop_path(x) + shortcut


def _placement(module: nn.Module) -> Dict[str, Any]:
    weight = next(module.parameters())
    return dict(device=weight.device, dtype=weight.dtype)


def share_basic_stage(
        stage: nn.Sequential,
        shared: int,
        unique: int,
        double: bool = False,
        folded: bool = False,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
) -> SharedStage:
    """Decompose all but the first of a stage's BasicBlocks; those blocks are changed in place.

    Args:
        stage: timm's stage.
        shared: Filters that the stage shares, in each basis.
        unique: Filters of each convolution's own.
        double: One basis for the first convolutions, one for the second (the paper's asterisk), instead of one for all.
        folded: Without the norms that :func:`fold_bases` folds into the coefficients.
        norm_layer: The norms on the basis and on the convolution.

    Raises:
        ValueError: If the filters are none, or more than the width allows.
    """
    dd = _placement(stage)
    blocks: List[Any] = list(stage)
    chs = blocks[-1].conv2.in_channels
    check_ranks(shared * (2 if double else 1), unique, 9 * chs)
    for block in blocks[1:]:
        for name, norm in (('conv1', 'bn1'), ('conv2', 'bn2')):
            conv = SharedBasisConv2d(
                chs, chs, shared, unique, dilation=getattr(block, name).dilation[0], folded=folded,
                norm_layer=norm_layer, **dd)
            setattr(block, name, conv)
            delattr(block, norm)
        block.__class__ = SharedBasicBlock
    shape = (shared, chs, 3, 3) if shared else None
    return SharedStage(blocks, shape, shape if double else None, **dd)


def share_basic_stages(
        model: nn.Module,
        digits: str,
        names: Sequence[str],
        shared: int,
        unique: int,
        double: bool,
        folded: bool,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
) -> None:
    """:func:`share_basic_stage` of some of a model's stages, in place; the numbers of filters grow with the width.

    Args:
        model: A model with BasicBlocks, the width of a stage twice that of the stage before.
        digits: Digits of the stages, the first is 1.
        names: Names of all stages.
        shared: Filters that the first stage shares, in each basis.
        unique: Filters of each convolution's own in the first stage.
        double: Two bases per stage.
        folded: Without norms.
        norm_layer: The norms.

    Raises:
        ValueError: If there are no filters, more than the width allows, or stages that do not exist.
    """
    if double and not shared:
        raise ValueError('sb_double asks for two bases per stage, but sb_rank is 0; give sb_rank or leave it out.')
    for name in stage_names(digits, names):
        factor = 2 ** names.index(name)
        stage: Any = model.get_submodule(name)
        model.set_submodule(
            name, share_basic_stage(stage, shared * factor, unique * factor, double, folded, norm_layer))


def stage_names(digits: str, names: Sequence[str]) -> List[str]:
    """Names of stages from their digits, the first stage is 1.

    Raises:
        ValueError: If there is no digit or another character.
    """
    known = {str(i): name for i, name in enumerate(names, start=1)}
    if not digits or not set(digits) <= set(known):
        raise ValueError(f"sb_stages '{digits}' must be digits of stages, such as '{''.join(known)}' or '3'.")
    return [known[digit] for digit in digits]


def share_convs(stage: nn.Sequential, block_cls: Type[nn.Module], names: Sequence[str]) -> SharedStage:
    """Share whole convolutions among all but the first of a stage's blocks; those blocks are changed in place.

    Args:
        stage: timm's stage.
        block_cls: Class of the blocks whose convolutions are called with the shared filters.
        names: Names of one or two convolutions in a block.
    """
    dd = _placement(stage)
    blocks: List[Any] = list(stage)
    shapes = [tuple(getattr(blocks[-1], name).weight.shape) for name in names]
    for block in blocks[1:]:
        for name in names:
            conv = getattr(block, name)
            setattr(block, name, SharedConv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.dilation[0]))
        block.__class__ = block_cls
    return SharedStage(blocks, *shapes, **dd)
