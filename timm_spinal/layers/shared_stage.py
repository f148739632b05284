"""A stage of a network whose blocks share filters."""

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import nn


@torch.fx.wrap
def as_argument(basis: torch.Tensor) -> torch.Tensor:
    """A shared parameter, detached where no gradients are recorded: FlopCounterMode cannot count otherwise."""
    return basis if torch.is_grad_enabled() else basis.detach()


class SharedStage(nn.Module):
    """The blocks of one stage, and the filters that they share: one tensor in, one tensor out.

    The first block is an ordinary one, the others are called with the shared filters (docs/papers/shared_bases.md,
    section 3). Blocks are the children '0', '1', ... as in a sequence of timm's; ``basis`` and ``basis2`` are
    parameters of the stage and of nothing else, so a state dict, an average or a shard holds each of them once.

    Iterating gives the steps, each from one tensor to one tensor, which is what gradient checkpointing goes along.

    Args:
        blocks: The blocks; all but the first have the forward ``(x, basis, basis2)``.
        shape: Shape of ``basis`` (filters, C, k, k), or None for none.
        shape2: Shape of ``basis2``, or None: then blocks get ``basis`` twice.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations at run time
        basis: Optional[nn.Parameter]
        basis2: Optional[nn.Parameter]

    def __init__(
            self,
            blocks: Iterable[Any],
            shape: Optional[Tuple[int, ...]],
            shape2: Optional[Tuple[int, ...]] = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)
            if i > 0:
                block.takes_basis = True  # an attribute of the block, since TorchScript resolves hasattr() of one
        for name, size in (('basis', shape), ('basis2', shape2)):
            basis = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, basis)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthonormal filters (columns, where there are more filters than numbers in one).

        See docs/papers/shared_bases.md, section 3.

        Two bases of equal shape are drawn as one matrix, so that they are orthogonal to each other as well.
        """
        bases = self.bases()
        groups = [bases] if len({basis.shape for basis in bases}) == 1 else [[basis] for basis in bases]
        for group in groups:
            rows = [len(basis) for basis in group]
            drawn = nn.init.orthogonal_(torch.empty(sum(rows), group[0][0].numel(), device=group[0].device))
            for basis, part in zip(group, drawn.split(rows)):
                basis.copy_(part.view(basis.shape))

    def basis_names(self) -> List[str]:
        """Names of the tensors that the stage shares."""
        return [name for name in ('basis', 'basis2') if getattr(self, name) is not None]

    def bases(self) -> List[torch.Tensor]:
        """The tensors that the stage shares."""
        return [getattr(self, name) for name in self.basis_names()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        basis, basis2 = self._arguments()
        for block in self.children():
            if hasattr(block, 'takes_basis'):
                x = block(x, basis, basis2)
            else:
                x = block(x)
        return x

    def _arguments(self):
        basis = None if self.basis is None else as_argument(self.basis)
        basis2 = basis if self.basis2 is None else as_argument(self.basis2)
        return basis, basis2

    def __iter__(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        basis, basis2 = self._arguments()
        for block in self.children():
            if hasattr(block, 'takes_basis'):
                yield partial(block, basis=basis, basis2=basis2)
            else:
                yield block

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]
