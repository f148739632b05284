"""Shared filter bases: convolutions of one stage of a network that share their filters.

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066 (docs/papers/shared_bases.md, sections 2 and 3). The paper's symbols: W the full
filters, B the basis of R filters, u of them unique to one convolution (U) and s shared by the stage (B_s), A the
coefficients.
"""

from typing import TYPE_CHECKING, Any, List, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import nn


@torch.fx.wrap
def basis_product(
        x: torch.Tensor,
        unique: Optional[torch.Tensor],
        basis: Optional[torch.Tensor],
        dilation: int = 1,
) -> torch.Tensor:
    """z = [U; B_s] * x, unique filters first: (N, C, H, W) -> (N, u + s, H, W).

    See docs/papers/shared_bases.md, section 2.

    One convolution over the concatenated filters.

    Args:
        x: Images.
        unique: U (u, C, k, k), or None.
        basis: B_s (s, C, k, k), or None; not both.
        dilation: Dilation of all filters.
    """
    if unique is not None and basis is not None:
        filters = torch.cat([unique, basis])
    else:
        only = unique if unique is not None else basis
        assert only is not None
        filters = only
    return F.conv2d(x, filters, None, 1, dilation * (filters.shape[2] - 1) // 2, dilation)


class JoinedFilters:
    """[U; B_s] of a convolution, joined anew only when one of the two has changed.

    A change by ``weight.data``, which PyTorch does not count, is not seen unless it gives the weight other memory.
    """

    def __init__(self) -> None:
        self.state: List[Any] = []
        self.parts: Tuple[torch.Tensor, ...] = ()  # held, so that no other tensor gets their memory
        self.filters: Optional[torch.Tensor] = None

    def __reduce__(self) -> Any:
        return JoinedFilters, ()  # copied and saved without what it holds

    def join(self, *parts: Any) -> Optional[torch.Tensor]:
        """The filters; None where a part is missing, or has no memory or no count of changes of its own."""
        if any(type(part) not in (torch.Tensor, nn.Parameter) or part.is_inference() for part in parts):
            return None
        try:
            state = [(p.data_ptr(), p._version, p.shape, p.stride(), p.dtype, p.device) for p in parts]
        except RuntimeError:  # as torch.func has them
            return None
        if state != self.state:
            self.state, self.parts, self.filters = state, parts, torch.cat(parts).detach()
        return self.filters


class SharedBasisConv2d(nn.Module):
    """A convolution decomposed over a basis of which a part is shared, and its norm: (N, C, H, W) -> (N, T, H, W).

    ::

        z = BN_basis([U; B_s] * x)    R = u + s channels; no ReLU
        y = BN(A . z)                 1x1, R -> T

    Stride 1, padding that keeps H and W (docs/papers/shared_bases.md, section 2). U, A and both norms are its own; B_s
    belongs to the stage and is passed to each call. In eval mode each call folds the norms into A and a bias
    (docs/papers/shared_bases.md, section 8). A folded one keeps [U; B_s] joined from call to call without gradients.

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
        shape = (unique, in_channels, kernel_size, kernel_size)
        self.register_parameter('unique', nn.Parameter(torch.empty(shape, **dd)) if unique else None)
        self.basis_norm = None if folded else norm_layer(rank, **dd)
        self.coeff = nn.Parameter(torch.empty(out_channels, rank, 1, 1, **dd))
        self.register_parameter('bias', nn.Parameter(torch.zeros(out_channels, **dd)) if folded else None)
        self.norm = None if folded else norm_layer(out_channels, **dd)
        self.joined = JoinedFilters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal by fan-out, as the paper's for every convolution but the shared ones.

        See docs/papers/shared_bases.md, section 3.
        """
        for filters in (self.unique, self.coeff):
            if filters is not None:
                nn.init.kaiming_normal_(filters, mode='fan_out', nonlinearity='relu')

    def forward(self, x: torch.Tensor, basis: Optional[torch.Tensor] = None) -> torch.Tensor:
        unique = self.unique
        if not torch.jit.is_scripting() and self.basis_norm is None and _is_plain_inference():
            filters = self.joined.join(unique, basis)
            if filters is not None:
                unique, basis = None, filters
        z = basis_product(x, unique, basis, self.dilation)
        if self.basis_norm is None:
            return F.conv2d(z, self.coeff, self.bias)
        elif hasattr(self.basis_norm, 'running_var') and not (self.basis_norm.training or self.norm.training):
            coeff, bias = self.fold()
            return F.conv2d(z, coeff, bias)
        else:
            return self.norm(F.conv2d(self.basis_norm(z), self.coeff))

    def fold(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """A' = diag(g2) A diag(g) and b' = g2 (A h) + h2, with g and h the scale and shift of a norm.

        See docs/papers/shared_bases.md, section 8.
        """
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


def _is_plain_inference() -> bool:
    """Whether tensors are computed without gradients, and nothing traces how."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


class SharedConv2d(nn.Module):
    """A convolution all of whose filters are shared: the stage owns them and passes them to each call.

    Stride 1, padding that keeps H and W, no bias (docs/papers/shared_bases.md, section 3).

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
