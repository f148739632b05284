"""Inter-layer collision (IC) convolution, a drop-in for ``nn.Conv2d``.

Paper: "IC Networks: Remodeling the Basic Unit for Convolutional Neural Networks", An, Liu, Zhao and Shen, 2021,
https://arxiv.org/abs/2102.03495. Its full text was not available (docs/papers/ic_networks.md): the neuron is sourced,
the convolution derived from it; what follows from neither is reconstructed, and an option.
"""

from typing import Any, List, Literal, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .capsule import float32_or_wider

IC_CHOICES = {
    'mode': ('filter', 'layer', 'pair'),
    'scale': ('mean', 'raw'),
    'norm': ('', 'bias', 'bn'),
}


def check_ic_options(ic_mode: str = 'filter', ic_scale: str = 'mean', ic_norm: str = '', ic_init: float = 1.) -> None:
    """Refuse values that :class:`ICConv2d` does not know.

    Raises:
        ValueError: If a value is unknown.
    """
    for name, value in (('mode', ic_mode), ('scale', ic_scale), ('norm', ic_norm)):
        if value not in IC_CHOICES[name]:
            raise ValueError(f'ic_{name} {value!r} is unknown; it is one of {", ".join(map(repr, IC_CHOICES[name]))}.')
    if isinstance(ic_init, bool) or not isinstance(ic_init, (int, float)) or not abs(ic_init) < float('inf'):
        raise ValueError(f'ic_init {ic_init!r} is not a finite number.')


def box_mean(
        x: torch.Tensor,
        channels: int,
        kernel_size: Tuple[int, int],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
) -> torch.Tensor:
    """Mean of each window of each channel, zeros of the padding counted: (N, channels, H, W) -> (N, channels, H', W').

    Args as in ``nn.Conv2d``.
    """
    if kernel_size == (1, 1) and stride == (1, 1) and padding == (0, 0):
        return x
    if dilation == (1, 1) and 2 * padding[0] <= kernel_size[0] and 2 * padding[1] <= kernel_size[1]:
        return F.avg_pool2d(x, kernel_size, stride, padding)
    # pooling has no dilation and less padding than a convolution with a constant filter for each channel
    kh, kw = kernel_size
    box = x.new_full((channels, 1, kh, kw), 1. / (kh * kw))
    return F.conv2d(x, box, None, stride, padding, dilation, channels)


def pre_activation(z: torch.Tensor, s: torch.Tensor, w: torch.Tensor, b1: Optional[torch.Tensor]) -> torch.Tensor:
    """u = z - w s + b1: z (N, G, K, H, W), s (N, G, H, W), w and b1 (G, K) -> (N, G, K, H, W)."""
    u = torch.addcmul(z, s.unsqueeze(2), w.unsqueeze(2).unsqueeze(3), value=-1)
    return u if b1 is None else u + b1.unsqueeze(2).unsqueeze(3)


class _AddReLU(torch.autograd.Function):
    """y = z + ReLU(u) with u of :func:`pre_activation`.

    Of each value it keeps one byte for the backward pass, whether u > 0, where autograd keeps four.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
            z: torch.Tensor,
            s: torch.Tensor,
            w: torch.Tensor,
            b1: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        u = pre_activation(z, s, w.to(z.dtype), None if b1 is None else b1.to(z.dtype))
        active = u > 0
        return u.relu_().add_(z), active

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
        _, s, w, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], s, w)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        active, s, w = ctx.saved_tensors
        du = active.view(torch.uint8).to(grad.dtype).mul_(grad)  # faster on a CPU than torch.where
        wide = float32_or_wider(du[:0]).dtype
        if du.dtype == wide and du.device.type == 'cpu':
            ds = -torch.einsum('ngkhw,gk->nghw', du, w)
            dw = -torch.einsum('ngkhw,nghw->gk', du, s)
        else:  # a product of matrices would round its sums to half precision or, of float32, its factors to TF32
            ds = -(du * w.to(du.dtype).unsqueeze(2).unsqueeze(3)).sum(2, dtype=wide)
            dw = -(du * s.unsqueeze(2)).sum((0, 3, 4), dtype=wide)
        return grad + du, ds, dw, du.sum((0, 3, 4), dtype=wide) if ctx.needs_input_grad[3] else None


@torch.jit.unused
def _is_recorded(tensors: List[Optional[torch.Tensor]]) -> bool:
    """Whether eager autograd records what is computed of some tensors; compilers and tracers get the expression."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


@torch.jit.unused
def _is_compiled_training() -> bool:
    return torch.compiler.is_compiling() and torch.is_grad_enabled()


@torch.jit.unused
def _add_relu(z: torch.Tensor, s: torch.Tensor, w: torch.Tensor, b1: Optional[torch.Tensor]) -> torch.Tensor:
    return _AddReLU.apply(z, s, w, b1)[0]


@torch.fx.wrap
def collide(
        z: torch.Tensor,
        s: torch.Tensor,
        w: torch.Tensor,
        groups: int,
        b1: Optional[torch.Tensor] = None,
        b2: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """y = z + ReLU(z - w s + b1) + b2, computed in the type of z: (N, C, H, W).

    Args:
        z: (N, C, H, W).
        s: (N, groups, H, W), one map for all filters of a group.
        w: (C,), each filter's own factor.
        groups: Number of groups of filters.
        b1: (C,).
        b2: (C,).
    """
    grouped, s, w = z.unflatten(1, (groups, -1)), s.to(z.dtype), w.view(groups, -1)
    if b1 is not None:
        b1 = b1.view(groups, -1)
    if not torch.jit.is_scripting() and _is_recorded([z, s, w, b1]):
        y = _add_relu(grouped, s, w, b1)
    elif not torch.jit.is_scripting() and _is_compiled_training():
        # one kernel: what is wider in between is never stored, and sums of the gradients of w and b1 are as wide
        y = (grouped + F.relu(pre_activation(float32_or_wider(grouped), float32_or_wider(s), w, b1))).to(z.dtype)
    else:
        b1 = None if b1 is None else b1.to(z.dtype)
        y = grouped + F.relu(pre_activation(grouped, s, w.to(z.dtype), b1), inplace=True)
    y = y.flatten(1, 2)
    return y if b2 is None else y + b2.to(z.dtype).view(-1, 1, 1)


class ICConv2d(nn.Conv2d):
    """Inter-layer collision convolution, (N, C_in, H, W) -> (N, C_out, H', W').

    For output channel o at position p, over the n pairs of an input channel c of o's group and a window place k::

        z = sum_ck W_ock x_c(p + k)                       what nn.Conv2d gives without bias
        S = sum_ck x_c(p + k)                             the box sum, one for all filters of a group
        y = z + ReLU(z - w'_o S + b1_o) + b2_o

    It is the paper's neuron y = f(w.x + sigma(w.x - w' 1.x + b1) + b2), sourced, at each position, derived, with sigma
    = ReLU, derived (docs/papers/ic_networks.md, section 2); f and the norm before it are the host's. ``bias`` is b2.

    ``ic_weight`` holds v = n w' (reconstructed, section 4 there), then w' S is v times the mean of the window, or w'
    itself. On inputs that come out of a ReLU a w' far above 1/n leaves sigma 0 everywhere and without gradient
    (section 3 there): therefore both start at v = 1, and :func:`timm_spinal.ic_active_share` shows where sigma is
    alive.

    A state dict of ``nn.Conv2d`` lacks ``ic_weight``, and ``ic_bias`` or ``ic_bn.*`` with an inner norm, and no more.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: As nn.Conv2d.
        ic_mode: What has a w' of its own. 'filter': each filter, the direct reading of the neuron. 'layer': the layer,
            for a single number more. 'pair': each input channel of each filter, where channels shall be reweighted one
            by one; on more than the 3x3 convolutions that is more costly than the paper says.
        ic_scale: 'mean': learns v, with steps like other weights'. 'raw': learns w' as the neuron has it; its steps
            move the output n^2 times as far, for small learning rates only.
        ic_norm: Inside sigma. '': nothing. 'bias': b1, where inputs may be negative or centred. 'bn': BatchNorm, which
            keeps about half of the positions active, for any ic_init.
        ic_init: v at the start, in either scale: 1 subtracts the window's mean, 0 starts at z + ReLU(z).

    Raises:
        ValueError: If a value of an option is unknown.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: Literal['zeros', 'reflect', 'replicate', 'circular'] = 'zeros',
            device=None,
            dtype=None,
            ic_mode: str = 'filter',
            ic_scale: str = 'mean',
            ic_norm: str = '',
            ic_init: float = 1.,
    ):
        check_ic_options(ic_mode, ic_scale, ic_norm, ic_init)
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **dd)
        kernel_area = self.kernel_size[0] * self.kernel_size[1]
        n = kernel_area * in_channels // groups
        divisor = 1 if ic_scale == 'raw' else n
        self.ic_mode = ic_mode
        self.ic_init = ic_init * divisor / n
        self.ic_factor = (kernel_area if ic_mode == 'pair' else n) / divisor  # w'S = ic_factor ic_weight local_mean
        # padding other than the same number of zeros on both sides comes in front of the convolution
        self.ic_pad_mode = 'constant' if padding_mode == 'zeros' else padding_mode
        self.ic_pad_first = isinstance(padding, str) or padding_mode != 'zeros'
        sides = {'valid': [0, 0], 'same': [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]}
        both = sides[padding] if isinstance(padding, str) else [2 * int(p) for p in self.padding]
        self.ic_pad = [part for total in reversed(both) for part in (total // 2, total - total // 2)]  # as F.pad
        self.ic_padding = (0, 0) if self.ic_pad_first else (int(self.padding[0]), int(self.padding[1]))

        shape = {'filter': (out_channels,), 'layer': (1,), 'pair': (out_channels, in_channels // groups)}[ic_mode]
        self.ic_weight = nn.Parameter(torch.empty(shape, **dd))
        self.ic_bias = nn.Parameter(torch.empty(out_channels, **dd)) if ic_norm == 'bias' else None
        self.ic_bn = nn.BatchNorm2d(out_channels, **dd) if ic_norm == 'bn' else None
        self.reset_added_parameters()

    @torch.jit.ignore
    def reset_added_parameters(self) -> None:
        """Reset the parameters of the collision; ``weight`` and ``bias`` stay."""
        nn.init.constant_(self.ic_weight, self.ic_init)
        if self.ic_bias is not None:
            nn.init.zeros_(self.ic_bias)
        if self.ic_bn is not None:
            self.ic_bn.reset_parameters()

    def local_mean(self, x: torch.Tensor) -> torch.Tensor:
        """S / n of each group, (N, groups, H', W'); in mode 'pair' of each input channel, (N, C_in, H', W')."""
        channels = self.in_channels
        if self.ic_mode != 'pair':
            channels = self.groups
            x = x.mean(1, keepdim=True) if channels == 1 else x.unflatten(1, (channels, -1)).mean(2)
        return box_mean(
            x, channels, self.kernel_size, self.stride, self.ic_padding, self.dilation)  # type: ignore[arg-type]

    def parts(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """z, (N, C_out, H', W'), :meth:`local_mean`, and its factors, (C_out,) or for pairs (C_out, C_in / groups)."""
        if self.ic_pad_first:
            x = F.pad(x, self.ic_pad, mode=self.ic_pad_mode)
        z = F.conv2d(x, self.weight, None, self.stride, self.ic_padding, self.dilation, self.groups)
        w = self.ic_weight * self.ic_factor
        if self.ic_mode == 'layer':
            w = w.expand(self.out_channels)
        return z, self.local_mean(x), w

    def pre_sigma(self, z: torch.Tensor, s: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """u = z - w'S + b1, which sigma gets, (N, C_out, H', W'), from :meth:`parts`."""
        u = z - F.conv2d(s, w.reshape(self.out_channels, -1, 1, 1), groups=self.groups)
        if self.ic_bias is not None:
            u = u + self.ic_bias.view(-1, 1, 1).to(u.dtype)
        if self.ic_bn is not None:
            u = self.ic_bn(u)
        return u

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, s, w = self.parts(x)
        if self.ic_mode != 'pair' and self.ic_bn is None:
            return collide(z, s, w, self.groups, self.ic_bias, self.bias)
        y = z + F.relu(self.pre_sigma(z, s, w))
        bias = self.bias  # TorchScript narrows the type of a local variable, not of an attribute
        if bias is not None:
            y = y + bias.view(-1, 1, 1).to(y.dtype)
        return y

    @torch.jit.ignore
    def fold_batchnorm(self, norm: nn.BatchNorm2d) -> Optional[nn.Module]:
        """A copy with the BatchNorm behind it folded in, for eval mode; None where a gain is negative.

        With a = gamma / sqrt(var + eps) >= 0 the collision scales as a whole, a (z + ReLU(z - w'S + b1)) =
        (a z) + ReLU((a z) - (a w') S + (a b1)), so W, w' and b1 take a, and b2 takes the rest. A negative a would turn
        ReLU around.
        """
        if norm.weight is not None and bool((norm.weight < 0).any()):
            return None
        new: Any = fuse_conv_bn_eval(self, norm)
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        if new.ic_mode == 'layer':
            new.ic_mode = 'filter'
            new.ic_weight = nn.Parameter(new.ic_weight.expand(len(scale)))
        new.ic_weight = nn.Parameter(new.ic_weight * scale.view(-1, *[1] * (new.ic_weight.ndim - 1)))
        if new.ic_bias is not None:
            new.ic_bias.mul_(scale)
        if new.ic_bn is not None:  # a BN(u) as one of a u
            new.ic_bn.running_mean.mul_(scale)
            new.ic_bn.bias.mul_(scale)
        return new

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, ic_mode={self.ic_mode}'
