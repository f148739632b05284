"""Other forms of a trained model with shared filter bases, which compute the same.

See docs/papers/shared_bases.md, section 8.

    plain = timm_spinal.merge_bases(model.eval())    # an ordinary timm model: resnet34 of a resnet34_sb_s48u1d
    folded = timm_spinal.fold_bases(model.eval())    # shares as before, without norms in decomposed convolutions

Both are exact, at borders too: padding comes before everything that is folded. They take a model that decomposes its
convolutions; in the forms that share whole convolutions a BatchNorm and a ReLU stand between a shared convolution and
the next one.
"""

import copy
import re
from typing import Any, Iterable, List, Optional, Tuple

import torch
from timm.models.resnet import BasicBlock
from torch import nn

from ..layers import SharedBasisConv2d, SharedStage
from ._shared_blocks import SharedBasicBlock
from ._shared_model import SharedBasisModel
from ._timm import get_own_args, set_own_args, update_model_args
from .attach_head import HEAD_NAME, headed_cls

_RANKS = re.compile(r'_sb_s\d+u\d+d?')


def merge_bases(model: nn.Module, stages: Optional[Iterable[str]] = None) -> nn.Module:
    """A copy with ordinary convolutions in place of decomposed ones: W' = A diag(g) B, rest in the BatchNorm.

    If all stages are merged, the copy has timm's class, name, keys and speed, and the model's head if it has one.

    Args:
        model: A model with decomposed convolutions, in eval mode; it is not changed.
        stages: Names of the stages to merge, all if None. If some are left, the copy has the option ``sb_stages``.

    Raises:
        ValueError: If the model has no such convolutions, is in training mode or has no running statistics.
    """
    _check(model, 'merge_bases')
    merged: Any = copy.deepcopy(model)
    sharing = merged.shared_stages()
    names = list(sharing) if stages is None else list(stages)
    if unknown := sorted(set(names) - set(sharing)):
        raise ValueError(f"The model has no decomposed stage '{unknown[0]}'; it has {', '.join(sharing)}.")
    for name in names:
        merged.set_submodule(name, _merged_stage(sharing[name]))
    left = ''.join(name[-1] for name in sharing if name not in names)
    args = dict(get_own_args(merged), sb_stages=left)
    if not left:
        args = {name: value for name, value in args.items() if not name.startswith('sb_')}
        _make_plain(merged)
    set_own_args(merged, args)
    return merged


def fold_bases(model: nn.Module) -> nn.Module:
    """A copy with the norms folded into its decomposed convolutions, y = A' . (B * x) + b'; the bases stay shared.

    See docs/papers/shared_bases.md, section 8.

    timm writes the option ``sb_folded`` to config.json, so the folded model loads again.

    Args:
        model: A model with decomposed convolutions, in eval mode; it is not changed.

    Raises:
        ValueError: If the model has no such convolutions, is in training mode or has no running statistics.
    """
    _check(model, 'fold_bases')
    folded: Any = copy.deepcopy(model)
    for name, conv in _decomposed(folded):
        if conv.basis_norm is not None:
            folded.set_submodule(name, _folded_conv(conv))
    update_model_args(folded, sb_folded=True)
    return folded


def _decomposed(model: nn.Module) -> List[Tuple[str, SharedBasisConv2d]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SharedBasisConv2d)]


def _check(model: nn.Module, function: str) -> None:
    convs = _decomposed(model)
    if not isinstance(model, SharedBasisModel):
        raise ValueError(f'{function}: {type(model).__name__} is not a model with shared filter bases of this package; '
                         'pass one from timm.create_model, without features_only.')
    if not convs:
        raise ValueError(
            f'{function}: {type(model).__name__} shares whole convolutions, and a BatchNorm and a ReLU stand between '
            'each of them and the next one, so there is nothing to merge; it is as fast as the plain net as it is.')
    if any(module.training for module in model.modules()):
        raise ValueError(f'{function}: the model is in training mode, where its BatchNorms depend on the batch; call '
                         'model.eval() first.')
    for name, conv in convs:
        if conv.basis_norm is not None and any(
                getattr(norm, 'running_var', None) is None for norm in (conv.basis_norm, conv.norm)):
            raise ValueError(f'{function}: {name} is normalised with statistics of the batch, not with running ones; '
                             'only a BatchNorm with track_running_stats can be folded.')


@torch.no_grad()
def _folded_conv(conv: SharedBasisConv2d) -> SharedBasisConv2d:
    unique = 0 if conv.unique is None else len(conv.unique)
    folded = SharedBasisConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.coeff.shape[1] - unique,
        unique,
        conv.kernel_size,
        conv.dilation,
        folded=True,
        device=conv.coeff.device,
        dtype=conv.coeff.dtype,
    ).train(conv.training)
    coeff, bias = copy.deepcopy(conv).double().fold()
    folded.coeff.copy_(coeff)
    assert folded.bias is not None
    folded.bias.copy_(bias)
    folded.unique = conv.unique
    return folded


@torch.no_grad()
def _merged_conv(conv: SharedBasisConv2d, basis: Optional[torch.Tensor]) -> Tuple[nn.Conv2d, nn.Module]:
    """One convolution, and the norm behind it, whose mean takes what the norm on the basis adds."""
    filters = torch.cat([part for part in (conv.unique, basis) if part is not None]).double().flatten(1)
    coeff = conv.coeff.double().flatten(1)
    if conv.basis_norm is None:
        norm: Any = nn.BatchNorm2d(conv.out_channels, device=coeff.device, dtype=conv.coeff.dtype).eval()
        norm.running_var.fill_(1. - norm.eps)
        norm.bias.copy_(conv.bias)
    else:
        inner = copy.deepcopy(conv.basis_norm).double()
        scale = inner.weight * torch.rsqrt(inner.running_var + inner.eps)
        norm = conv.norm
        norm.running_mean -= coeff @ (inner.bias - inner.running_mean * scale)
        coeff = coeff * scale
    merged = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        padding=conv.dilation * (conv.kernel_size - 1) // 2,
        dilation=conv.dilation,
        bias=False,
        device=coeff.device,
        dtype=conv.coeff.dtype,
    ).train(conv.training)
    merged.weight.copy_((coeff @ filters).view_as(merged.weight))
    return merged, norm


def _merged_stage(stage: SharedStage) -> nn.Sequential:
    """timm's stage of the same function; the blocks are changed in place."""
    basis2 = stage.basis if stage.basis2 is None else stage.basis2
    blocks: List[Any] = list(stage.children())
    for block in blocks:
        if isinstance(block, SharedBasicBlock):
            modules = dict(block.named_children())
            for name in modules:
                delattr(block, name)
            for name, module in modules.items():  # in timm's order
                if isinstance(module, SharedBasisConv2d):
                    conv, norm = _merged_conv(module, stage.basis if name == 'conv1' else basis2)
                    block.add_module(name, conv)
                    block.add_module(name.replace('conv', 'bn'), norm)
                else:
                    block.add_module(name, module)
            del block.takes_basis
            block.__class__ = BasicBlock  # type: ignore[assignment]
    return nn.Sequential(*blocks).train(stage.training)


def _make_plain(model: Any) -> None:
    """The class and the name of the plain architecture."""
    cfg = dict(model.pretrained_cfg)
    cfg['architecture'] = _RANKS.sub('', cfg['architecture'])
    if hasattr(model, HEAD_NAME):
        model.backbone_architecture = _RANKS.sub('', model.backbone_architecture)
        model.__class__ = headed_cls(type(model).backbone_cls.plain_cls)
    else:
        model.__class__ = type(model).plain_cls
    model.pretrained_cfg = model.default_cfg = cfg
    del model.sb_decay
