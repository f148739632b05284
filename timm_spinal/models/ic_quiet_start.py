"""Start of a converted model from plain weights without any image: collisions that are rare.

Not sourced. The rule of :mod:`.ic_warm_start` takes the quantile of z / S from images; here it is that of inputs as
they come out of BatchNorm and ReLU, x = max(0, g) with g standard normal, of which mean and variance are known.
"""

import math

import torch
from torch import nn

from ..layers import ICConv2d
from .ic_active_share import ic_convs
from .ic_warm_start import set_ratio

MEAN = 1. / math.sqrt(2. * math.pi)  # of max(0, g)
VARIANCE = 0.5 - MEAN ** 2
LEAST = 0.1  # of the mean's part in the denominators, for convolutions of few inputs, which are alive anyway


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
            _start(conv, q)


def _start(conv: ICConv2d, q: float) -> None:
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
