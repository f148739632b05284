"""Warm start: a converted model that at step 0 is nearly the plain model whose weights it has.

Not sourced; the quantile rule of spec ic_networks_wld 4.4. A collision z + ReLU(z - w'S) is the plain z wherever
z <= w'S, for S > 0 where z / S <= w'. With w' at a high quantile of z / S few positions collide, so the function is
nearly the plain model's, and some do, so that w' gets a gradient.
"""

import math
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from ..layers import ICConv2d
from .ic_active_share import ic_active_share, ic_convs
from .recalibrate_bn import Batches, device_of, images_of, recalibrate_bn

PLACES = 2 ** 14  # of a batch, from which a quantile is taken


@torch.no_grad()
def ic_warm_start(
        model: nn.Module,
        batches: Batches,
        active: float = 0.01,
        count: int = 8,
        bn_count: Optional[int] = 200,
) -> Dict[str, float]:
    """Choose each w' so that few positions collide, then estimate BatchNorm statistics anew, in place.

    Other parameters stay. It looks at the plain model, collisions switched off, in eval mode: weights and BatchNorm
    statistics are to be those of a trained plain model, as ``pretrained=True`` or :func:`timm_spinal.convert_to_ic`
    leave them. The rule is for inputs that are not negative, such as those behind a ReLU; where they are, more
    positions are active than asked for.

    Args:
        model: A model with IC convolutions without BatchNorm inside sigma.
        batches: A loader that can be iterated twice, or a batch of images, on any device; as in training, since the
            statistics are made of it.
        active: Share of positions to be active, in (0, 1). Little keeps more of the plain function, much gives w' more
            gradient.
        count: Batches for w', over which quantiles are averaged.
        bn_count: Batches for BatchNorm statistics, at most; all where None.

    Returns:
        :func:`timm_spinal.ic_active_share` of the first batches afterwards.

    Raises:
        ValueError: If the model has no IC convolution, one has BatchNorm inside sigma, which keeps about half of its
            positions active whatever w' is, the share is outside (0, 1), or there is no batch.
    """
    convs = ic_convs(model)
    if not 0. < active < 1.:
        raise ValueError(f'active {active!r} is not in (0, 1); it is the share of positions that collide.')
    for name, conv in convs.items():
        if conv.ic_bn is not None:
            raise ValueError(f"'{name}' has BatchNorm inside sigma, which no w' keeps quiet; use ic_norm='' or 'bias'.")
    training = model.training
    found: Dict[str, List[torch.Tensor]] = {name: [] for name in convs}
    hooks = [conv.register_forward_hook(_measure(found[name], active)) for name, conv in convs.items()]
    try:
        model.eval()
        for images in images_of(batches, count, device_of(model)):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    for name, conv in convs.items():
        conv.reset_collision()
        set_ratio(conv, torch.stack(found[name]).mean(0))
    recalibrate_bn(model, batches, bn_count)
    return ic_active_share(model, batches, 1)


def _measure(found: List[torch.Tensor], active: float) -> Any:
    """A hook that notes the quantile of a batch and gives the plain convolution's output."""
    def hook(conv: ICConv2d, args: Any, output: torch.Tensor) -> torch.Tensor:
        z, s, _ = conv.parts(args[0])
        found.append(_quantile(_ratios(conv, z, s), active))
        return z if conv.bias is None else z + conv.bias.view(-1, 1, 1).to(z.dtype)
    return hook


def _ratios(conv: ICConv2d, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """z over the local mean (in mode 'pair' over its sum over channels), one row for each w', for some places."""
    s = s.unflatten(1, (conv.groups, -1)).sum(2)
    step = math.ceil(s[:, 0].numel() / PLACES)
    s, z = (t.float().movedim(0, 1).flatten(1)[:, ::step] for t in (s, z))
    s = s.repeat_interleave(len(z) // len(s), 0)
    ratios = torch.where(s > 0, z / s, -math.inf)  # nothing collides where all is 0
    return ratios.view(1, -1) if conv.ic_mode == 'layer' else ratios


def _quantile(ratios: torch.Tensor, active: float) -> torch.Tensor:
    """What a share of each row is above."""
    rank = min(ratios.shape[1], max(1, math.ceil((1. - active) * ratios.shape[1])))
    return ratios.kthvalue(rank, dim=1).values


@torch.no_grad()
def set_ratio(conv: ICConv2d, ratio: torch.Tensor) -> None:
    """Set w' so that w'S is the ratio times what :func:`_ratios` divides by.

    Filters that hardly ever see an input keep theirs.
    """
    w = ratio / conv.ic_factor
    seen = w.isfinite()
    target = conv.ic_weight.view(len(w), -1)
    target[seen] = w[seen].unsqueeze(1).to(target.dtype).expand(-1, target.shape[1])
