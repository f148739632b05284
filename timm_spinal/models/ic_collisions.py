"""How the collisions of an IC model start, and how many of them are active.

See docs/papers/ic_networks.md, sections 3 and 7.

Where the share of positions with u = z - w'S + b1 > 0 is 0, ReLU(u) is 0 everywhere, gives no gradient to w', and the
layer trains as a plain convolution; where it is 1, the layer is linear.

A collision z + ReLU(z - w'S) is the plain z wherever z <= w'S, for S > 0 where z / S <= w'. With w' at a high quantile
of z / S few positions collide, so the function is nearly the plain model's, and some do, so that w' gets a gradient.
This quantile rule is not sourced. `ic_warm_start` measures the quantile on images; `start_collisions`, without images,
computes it for inputs as they come out of BatchNorm and ReLU, x = max(0, g) with g standard normal.
"""

import math
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from ..layers import ICConv2d
from .recalibrate_bn import Batches, device_of, images_of, recalibrate_bn

PLACES = 2 ** 14  # of a batch, from which a quantile is taken
MEAN = 1. / math.sqrt(2. * math.pi)  # of max(0, g)
VARIANCE = 0.5 - MEAN ** 2
LEAST = 0.1  # of the mean's part in the denominators, for convolutions of few inputs, which are alive anyway


def ic_convs(model: nn.Module) -> Dict[str, ICConv2d]:
    """Its IC convolutions by name.

    Raises:
        ValueError: If there are none.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, ICConv2d)}
    if not convs:
        raise ValueError(
            f'{type(model).__name__} has no IC convolution; make one by timm_spinal.convert_to_ic or by a name such as '
            'icresnet50.')
    return convs


@torch.no_grad()
def ic_active_share(model: nn.Module, batches: Batches, count: Optional[int] = None) -> Dict[str, float]:
    """Share of active positions, over images, places and filters, of each IC convolution, in [0, 1].

    Args:
        model: In the mode to measure in. For a new model this is train mode, since BatchNorm has no statistics yet.
            Buffers are restored afterwards.
        batches: A loader, or a batch of images, on any device.
        count: Largest number of batches; all if None.

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


@torch.no_grad()
def ic_warm_start(
        model: nn.Module,
        batches: Batches,
        active: float = 0.01,
        count: int = 8,
        bn_count: Optional[int] = 200,
) -> Dict[str, float]:
    """Choose each w' so that few positions collide, then re-estimate the BatchNorm statistics, in place.

    Other parameters stay. The quantiles are measured on the plain model, without collisions, in eval mode: weights and
    BatchNorm statistics must be those of a trained plain model, as after ``pretrained=True`` or
    :func:`timm_spinal.convert_to_ic`. The rule is for inputs that are not negative, such as those behind a ReLU; with
    negative inputs, more positions are active than asked for.

    Args:
        model: A model with IC convolutions without BatchNorm inside sigma.
        batches: A loader that can be iterated twice, or a batch of images, on any device; as in training, since the
            statistics are made of it.
        active: Share of positions to be active, in (0, 1). A small share keeps more of the plain function, a large one
            gives w' more gradient.
        count: Batches for w', over which quantiles are averaged.
        bn_count: Largest number of batches for BatchNorm statistics; all if None.

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
            raise ValueError(f"'{name}' has BatchNorm inside sigma, so its collisions are active for any w'; use "
                             "ic_norm='' or 'bias'.")
    training = model.training
    quantiles: Dict[str, List[torch.Tensor]] = {name: [] for name in convs}
    hooks = [conv.register_forward_hook(_measure(quantiles[name], active)) for name, conv in convs.items()]
    try:
        model.eval()
        for images in images_of(batches, count, device_of(model)):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    for name, conv in convs.items():
        conv.reset_added_parameters()
        set_ratio(conv, torch.stack(quantiles[name]).mean(0))
    recalibrate_bn(model, batches, bn_count)
    return ic_active_share(model, batches, 1)


def _measure(quantiles: List[torch.Tensor], active: float) -> Any:
    """A hook that notes the quantile of a batch and gives the plain convolution's output."""
    def hook(conv: ICConv2d, args: Any, output: torch.Tensor) -> torch.Tensor:
        z, s, _ = conv.parts(args[0])
        quantiles.append(_quantile(_ratios(conv, z, s), active))
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


def start_collisions(model: nn.Module, options: Dict[str, Any]) -> bool:
    """Start a converted model from the weights of the plain one by :func:`ic_quiet_start`, where that is wanted.

    Args:
        model: A converted model with the weights of a plain one.
        options: Options of the conversion that were given, without prefix.

    Returns:
        Whether it was: an ``init`` that is given stays, and BatchNorm inside sigma keeps about half of the positions
        active for any w'.
    """
    if 'init' in options or options.get('norm') == 'bn':
        return False
    ic_quiet_start(model)
    return True


@torch.no_grad()
def ic_quiet_start(model: nn.Module, active: float = 0.02) -> None:
    """Choose each w', in place, so that about a share of the positions collides; other parameters stay.

    BatchNorm statistics of the plain model then nearly fit. Layers with BatchNorm inside sigma stay as they are. Where
    images are at hand :func:`timm_spinal.ic_warm_start` comes nearer to the plain model.

    Args:
        model: A converted model with the weights of a plain one.
        active: The share, in (0, 0.5).

    Raises:
        ValueError: If the share is outside (0, 0.5).
    """
    if not 0. < active < 0.5:
        raise ValueError(f'active {active!r} is not in (0, 0.5); it is the share of positions that collide.')
    q = math.sqrt(2.) * float(torch.erfinv(torch.tensor(1. - 2. * active, dtype=torch.float64)))
    for conv in ic_convs(model).values():
        if conv.ic_bn is None:
            _start_rarely_active(conv, q)


def _start_rarely_active(conv: ICConv2d, q: float) -> None:
    """w' = m + d, with m the mean of the filter and d so that the mean of u = z - w'S is q deviations below zero.

    With n inputs that do not depend on each other, E u = -n d MEAN and var u = VARIANCE (sum (W - m)^2 + n d^2). The
    inputs of a channel within a window are alike rather than independent; the larger d of the two cases is taken.
    """
    weight = conv.weight.double()
    area = conv.kernel_size[0] * conv.kernel_size[1]
    mean = weight.mean((1, 2, 3))
    d = torch.maximum(_shift(weight.flatten(1), q), _shift(weight.sum((2, 3)), q) / area)
    ratio = (mean + d) * (area if conv.ic_mode == 'pair' else weight[0].numel())
    set_ratio(conv, ratio.amax(0, keepdim=True) if conv.ic_mode == 'layer' else ratio)


def _shift(weight: torch.Tensor, q: float) -> torch.Tensor:
    """d of each row, for independent inputs."""
    n = weight.shape[1]
    squares = (weight - weight.mean(1, keepdim=True)).square().sum(1)
    rest = max(n * MEAN ** 2 - q * q * VARIANCE, LEAST * n * MEAN ** 2)
    return q * (VARIANCE * squares / (n * rest)).sqrt()
