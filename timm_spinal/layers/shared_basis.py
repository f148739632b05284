"""Shared filter bases: convolutions of one stage of a network that share their filters.

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066 (spec shared_basis 1). The paper's symbols: W the full filters, B the basis of R
filters, u of them unique to one convolution (U) and s shared by the stage (B_s), A the coefficients.
"""

from typing import TYPE_CHECKING, Any, List, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import nn

from .shared_basis_kernel import MAX_UNIQUE, can_run, is_transformed


def product_by_taps(x: torch.Tensor, filters: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """The 'same' convolution of a few filters as one matrix product, of which each tap is added at its place.

    Args:
        x: Images (N, C, H, W), fastest where they lie channels last.
        filters: Filters (u, C, k, k), k odd.
        dilation: Dilation; the padding is the one that keeps H and W.

    Returns:
        (N, u, H, W), equal to ``conv2d(x, filters, padding=dilation * (k - 1) // 2, dilation=dilation)``.
    """
    n, chs, height, width = x.shape
    kernel = filters.shape[2]
    taps = filters.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, chs)
    products = torch.mm(taps, x.transpose(0, 1).reshape(chs, -1)).view(-1, n, height * width)
    size = (int(height), int(width))  # which torch.jit.trace gives as tensors
    return F.fold(
        products.transpose(0, 1), size, int(kernel), dilation=dilation, padding=dilation * (int(kernel) - 1) // 2)


@torch.fx.wrap
def basis_product(
        x: torch.Tensor,
        unique: Optional[torch.Tensor],
        basis: Optional[torch.Tensor],
        dilation: int = 1,
        apart: bool = False,
) -> torch.Tensor:
    """z = [U; B_s] * x, unique filters first (spec shared_basis 1.1): (N, C, H, W) -> (N, u + s, H, W).

    One convolution over the concatenated filters.

    Args:
        x: Images.
        unique: U (u, C, k, k), or None.
        basis: B_s (s, C, k, k), or None; not both.
        dilation: Dilation of all filters.
        apart: Compute the unique filters apart where that is faster without gradients: channels last on a CPU.
    """
    if basis is not None and basis.is_mkldnn:  # packed for shared_basis_kernel, which cannot run after all
        basis = basis.to_dense()
    if unique is not None and basis is not None:
        padding = dilation * (basis.shape[2] - 1) // 2
        if apart and x.device.type == 'cpu' and x.is_contiguous(memory_format=torch.channels_last):
            parts = [product_by_taps(x, unique, dilation), F.conv2d(x, basis, None, 1, padding, dilation)]
            return torch.cat([part.permute(0, 2, 3, 1) for part in parts], 3).permute(0, 3, 1, 2)
        return F.conv2d(x, torch.cat([unique, basis]), None, 1, padding, dilation)
    filters = unique if unique is not None else basis
    assert filters is not None
    return F.conv2d(x, filters, None, 1, dilation * (filters.shape[2] - 1) // 2, dilation)


@torch.fx.wrap
def combine(z: torch.Tensor, coeff: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """y = A . z + b, a 1x1 convolution: (N, R, H, W) -> (N, T, H, W)."""
    # a dilation means nothing to a 1x1 filter, but has PyTorch take oneDNN on one thread too, which is faster here
    return F.conv2d(z, coeff, bias, dilation=2 if z.device.type == 'cpu' else 1)


class SharedBasisConv2d(nn.Module):
    """A convolution decomposed over a basis of which a part is shared, and its norm: (N, C, H, W) -> (N, T, H, W).

    ::

        z = BN_basis([U; B_s] * x)    R = u + s channels; no ReLU
        y = BN(A . z)                 1x1, R -> T

    Stride 1, padding that keeps H and W (spec shared_basis 1.2). U, A and both norms are its own; B_s belongs to the
    stage and comes with each call. In eval mode the norms are folded into A and a bias on the way (spec 8.1 a).

    Args:
        in_channels: C.
        out_channels: T.
        shared: Number s of shared filters.
        unique: Number u of unique filters.
        kernel_size: k, odd.
        dilation: Dilation of the filters.
        folded: For good without norms, with a bias: y = A' . ([U; B_s] * x) + b'.
        norm_layer: Both norms.

    Raises:
        ValueError: If there are no filters, or more than the k k C that can be independent.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations at run time
        unique: Optional[nn.Parameter]
        basis_norm: Any
        norm: Any
        bias: Optional[nn.Parameter]

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            shared: int,
            unique: int = 1,
            kernel_size: int = 3,
            dilation: int = 1,
            folded: bool = False,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        rank = check_ranks(shared, unique, in_channels * kernel_size ** 2)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.few_unique = unique <= MAX_UNIQUE
        shape = (unique, in_channels, kernel_size, kernel_size)
        self.register_parameter('unique', nn.Parameter(torch.empty(shape, **dd)) if unique else None)
        self.basis_norm = None if folded else norm_layer(rank, **dd)
        self.coeff = nn.Parameter(torch.empty(out_channels, rank, 1, 1, **dd))
        self.register_parameter('bias', nn.Parameter(torch.zeros(out_channels, **dd)) if folded else None)
        self.norm = None if folded else norm_layer(out_channels, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal by fan-out, as the paper's for every convolution but the shared ones (spec 1.8)."""
        for filters in (self.unique, self.coeff):
            if filters is not None:
                nn.init.kaiming_normal_(filters, mode='fan_out', nonlinearity='relu')

    def forward(self, x: torch.Tensor, basis: Optional[torch.Tensor] = None) -> torch.Tensor:
        if not torch.jit.is_scripting() and basis is not None and self.runs_in_c(x, basis):
            return self.run_in_c(x, basis)
        apart = self.few_unique and not self.training
        if not torch.jit.is_scripting():
            apart = apart and not is_transformed()
        z = basis_product(x, self.unique, basis, self.dilation, apart)
        if self.basis_norm is None:
            return combine(z, self.coeff, self.bias)
        elif hasattr(self.basis_norm, 'running_var') and not (self.basis_norm.training or self.norm.training):
            coeff, bias = self.fold()
            return combine(z, coeff, bias)
        else:
            return self.norm(combine(self.basis_norm(z), self.coeff))

    @torch.jit.unused
    def runs_in_c(self, x: torch.Tensor, basis: Optional[torch.Tensor]) -> bool:
        """Whether there is a faster way than torch's convolutions, see shared_basis_kernel."""
        if basis is None or self.unique is None or not self.few_unique or self.training:
            return False
        norms = [] if self.basis_norm is None else [self.basis_norm, self.norm]
        if not all(type(norm) is nn.BatchNorm2d and not norm.training for norm in norms):
            return False
        shifts = [self.bias] if self.basis_norm is None else [t for norm in norms for t in _norm_tensors(norm)]
        tensors = [basis, self.coeff, *shifts]
        return all(t is not None for t in tensors) and can_run(x, self.unique, tensors)

    @torch.jit.unused
    def run_in_c(
            self,
            x: torch.Tensor,
            basis: torch.Tensor,
            shortcut: Optional[torch.Tensor] = None,
            relu: bool = False,
    ) -> torch.Tensor:
        """The output, where :meth:`runs_in_c`, plus a shortcut, through a ReLU."""
        from .shared_basis_op import shared_basis_conv  # not before it is needed: to register an operator takes time
        assert self.unique is not None
        norms: List[Any] = [self.bias]
        eps: List[float] = []
        if self.basis_norm is not None:
            norms = [*_norm_tensors(self.basis_norm), *_norm_tensors(self.norm)]
            eps = [self.basis_norm.eps, self.norm.eps]
        return shared_basis_conv(x, basis, self.unique, self.coeff, norms, eps, self.dilation, shortcut, relu)

    def fold(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """A' = diag(g2) A diag(g) and b' = g2 (A h) + h2, with g and h the scale and shift of a norm (spec 8.1 a)."""
        scale = self.basis_norm.weight * torch.rsqrt(self.basis_norm.running_var + self.basis_norm.eps)
        shift = self.basis_norm.bias - self.basis_norm.running_mean * scale
        scale2 = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        coeff = self.coeff.flatten(1) * scale2.unsqueeze(1)
        bias = torch.addmv(self.norm.bias - self.norm.running_mean * scale2, coeff, shift)
        return (coeff * scale).unsqueeze(2).unsqueeze(3), bias

    def extra_repr(self) -> str:
        unique = 0 if self.unique is None else len(self.unique)
        return (f'{self.in_channels}, {self.out_channels}, shared={self.coeff.shape[1] - unique}, unique={unique}, '
                f'kernel_size={self.kernel_size}')


def _norm_tensors(norm: Any) -> List[torch.Tensor]:
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def check_ranks(shared: int, unique: int, width: int) -> int:
    """The rank R = s + u of a decomposed convolution.

    Args:
        shared: s.
        unique: u.
        width: Numbers in a filter, k k C: so many filters can be orthogonal.

    Raises:
        ValueError: If a number is negative, both are 0, or they exceed the width.
    """
    if shared < 0 or unique < 0:
        raise ValueError(f'Numbers of filters must not be negative, but shared is {shared} and unique is {unique}.')
    if not shared and not unique:
        raise ValueError('A basis without shared (S0) and without unique filters (U0) is empty; give one of them.')
    if shared + unique > width:
        raise ValueError(
            f'{shared} shared and {unique} unique filters are more than the {width} that can be independent in this '
            'width; lower one of them.')
    return shared + unique


class SharedConv2d(nn.Module):
    """A convolution all of whose filters are shared: the stage owns them, they come with each call.

    Stride 1, padding that keeps H and W, no bias (spec shared_basis 1.5, 1.6).

    Args:
        in_channels: C.
        out_channels: T.
        kernel_size: k, odd.
        dilation: Dilation of the filters.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.dilation = dilation

    def forward(self, x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, basis, None, 1, self.dilation * (self.kernel_size - 1) // 2, self.dilation)

    def extra_repr(self) -> str:
        return f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}'
