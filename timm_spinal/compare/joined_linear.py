"""Linear layers of a head with what stands in front of them: inputs joined, then dropout.

On cached features much of the time of a head goes into inputs that are joined, masks of floats, and gradients of the
features, which nothing uses. Here the three are one function, which joins only what it must, computes no gradient
where no weight has made the input, and passes over what dropout has set to zero. Which layers can be replaced is read
from the traced head.
"""
import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from timm_spinal.layers.dropout_kernel import join_and_drop, scale_kept
from timm_spinal.layers.sparse_product import can_multiply, sparse_product

from .stacked import SeededDropout

TOLERANCE = 1e-4  # of the greatest logit, between a head and its traced form
SPARSE_FROM = 0.5  # dropout rate from which products that pass over zeros are the faster ones


def _is_sparse(drop: SeededDropout | None, weight: torch.Tensor) -> bool:
    """Whether the products of a layer (out, in) with its dropped inputs pass over zeros."""
    return drop is not None and drop.p >= SPARSE_FROM and can_multiply(weight, weight.shape[0])


class _JoinedLinear(torch.autograd.Function):
    """linear(dropout(cat(parts))); without dropout, leading parts that need no gradient are not joined at all."""

    @staticmethod
    def forward(
            ctx: Any,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            dropout: SeededDropout | None,
            *parts: torch.Tensor,
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[3:]
        first = needed.index(True) if any(needed) else len(parts)  # all parts behind it count as needed
        ctx.dropout, ctx.first, ctx.widths = dropout, first, [part.shape[1] for part in parts]
        if dropout is not None:
            joined, ctx.keep = join_and_drop(parts, dropout.p, dropout.generator)
            blocks = [joined]
        else:
            blocks = list(parts[:first])
            if rest := parts[first:]:
                blocks.append(rest[0] if len(rest) == 1 else torch.cat(rest, dim=1))
        ctx.save_for_backward(weight, *blocks)
        ctx.sparse = _is_sparse(dropout, weight)
        if ctx.sparse:
            return sparse_product(blocks[0], weight.t(), bias)
        columns = weight.split([block.shape[1] for block in blocks], dim=1)
        y = F.linear(blocks[0], columns[0], bias)
        for block, some in zip(blocks[1:], columns[1:]):
            y.addmm_(block, some.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        weight, *blocks = ctx.saved_tensors
        first, start = ctx.first, sum(ctx.widths[:ctx.first])
        if ctx.sparse:
            grad_weight = sparse_product(blocks[0].t(), grad).t()
        else:
            grad_weight = torch.empty_like(weight)
            for block, out in zip(blocks, grad_weight.split([block.shape[1] for block in blocks], dim=1)):
                torch.mm(grad.t(), block, out=out)
        grads: list[torch.Tensor | None] = [None] * len(ctx.widths)
        if first < len(grads):
            grad_parts = grad @ weight[:, start:]
            if ctx.dropout is not None:
                scale_kept(grad_parts, ctx.keep[:, start:], ctx.dropout.p)
            grads[first:] = grad_parts.split(ctx.widths[first:], dim=1)
        return grad_weight, grad.sum(dim=0) if ctx.needs_input_grad[1] else None, None, *grads


class JoinedLinear(nn.Module):
    """A linear layer on inputs (N, W_i) that lie side by side, behind a dropout.

    Args:
        linear: Its weight and bias are shared.
        drop: Dropout on the joined inputs, None for none.
    """

    def __init__(self, linear: nn.Module, drop: SeededDropout | None):
        super().__init__()
        self.weight, self.bias, self.drop = linear.weight, linear.bias, drop
        if _is_sparse(drop, self.weight):  # the layout that its products take, and in which its gradient comes
            self.weight.data = self.weight.data.t().contiguous().t()

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        if any(part.ndim != 2 for part in parts):
            raise ValueError(f'JoinedLinear takes (N, W) inputs, got {[tuple(part.shape) for part in parts]}.')
        active = self.drop is not None and self.drop.training and self.drop.p > 0.
        return _JoinedLinear.apply(self.weight, self.bias, self.drop if active else None, *parts)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SeededDropout) or super().is_leaf_module(m, module_qualified_name)


def _trace(head: nn.Module) -> fx.GraphModule:
    """The head as a graph, on the same parameters, with the defaults of what its forward takes beside the features."""
    parameters = inspect.signature(head.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return fx.GraphModule(head, _Tracer().trace(head, concrete_args=defaults))


def _replace(head: fx.GraphModule, node: fx.Node) -> None:
    """Let a node of a linear layer take in the dropout and the joining in front of it."""
    linear, drop, passed = head.get_submodule(str(node.target)), None, []
    source: Any = node.args[0]
    # nothing else reads what it drops, and no other dropout draws in between
    if source.op == 'call_module' and len(source.users) == 1 and source.next is node:
        module = head.get_submodule(source.target)
        if isinstance(module, SeededDropout):
            drop, source = module, source.args[0]
            passed.append(node.args[0])
    parts: Any = [source]
    if source.target is torch.cat and {*source.args[1:], *source.kwargs.values()} <= {1, -1}:
        parts = source.args[0]
        passed.append(source)
    if isinstance(linear, JoinedLinear) and linear.drop is not drop:
        raise ValueError(f'{node.target} is called with dropout and without.')
    head.set_submodule(str(node.target), JoinedLinear(linear, drop))
    node.args = tuple(parts)
    for old in passed:
        if not old.users:
            head.graph.erase_node(old)


def join_linears(head: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy of a head with `JoinedLinear` in place of its linear layers; the head itself, if it cannot be traced.

    State dicts of both have the same names. Not while heads compute on other threads: `torch.fx` changes `nn.Module`
    as it traces.

    Args:
        head: Head on features that need no gradient; its dropouts are seeded. Left as it is, but in training mode.
        x: Some of the features, (N, F), on which both forms are compared.
    """
    try:
        joined = _trace(copy.deepcopy(head).train())
        for node in list(joined.graph.nodes):
            if node.op == 'call_module' and type(joined.get_submodule(node.target)) in (nn.Linear, JoinedLinear):
                _replace(joined, node)
        joined.delete_all_unused_submodules()
        joined.recompile()
        with torch.no_grad():  # in evaluation mode a branch that was traced for training shows
            expected, found = head.eval()(x), joined.eval()(x)
        same = torch.allclose(found, expected, rtol=0., atol=TOLERANCE * float(expected.abs().max()))
    except Exception:  # whatever a head of somebody else does with what is not a tensor
        same = False
    head.train()
    return joined.train() if same else head
