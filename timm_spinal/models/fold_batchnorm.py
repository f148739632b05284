"""BatchNorm folded into the convolution before it, for inference: exact for plain convolutions, and for IC ones where
no gain is negative.

With a = gamma / sqrt(var + eps) >= 0 the collision scales as a whole, a (z + ReLU(z - w'S + b1)) =
(a z) + ReLU((a z) - (a w') S + (a b1)), so W, w' and b1 take a, and b2 takes the rest. A negative a would turn ReLU
around; such a layer keeps its BatchNorm.
"""

import copy
from typing import Any, Dict, List, Tuple

import torch
import torch.fx
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import ICConv2d

CONVS = (nn.Conv2d, Conv2dSame, ICConv2d)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


class _Tracer(torch.fx.Tracer):
    """Does not look into convolutions and norms, nor into what timm's own tracing leaves whole."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = CONVS + NORMS + tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.leaves or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy without the BatchNorm layers that directly follow a convolution, where that is exact.

    The copy computes the same in eval mode. It is for inference: its keys are no longer those of its name.

    Args:
        model: A model that torch.fx can trace, as timm's CNNs, in eval mode; it stays as it is.

    Raises:
        ValueError: If the model is in training mode, cannot be traced, or has nothing to fold.
    """
    if any(module.training for module in model.modules()):
        raise ValueError('fold_batchnorm: the model is in training mode, where its BatchNorms depend on the batch; '
                         'call model.eval() first.')
    folded = copy.deepcopy(model)
    modules: Dict[str, Any] = dict(folded.named_modules())
    pairs = [(c, n) for c, n in _pairs(folded, modules) if _is_exact(modules[c], modules[n])]
    if not pairs:
        raise ValueError(f'fold_batchnorm: {type(model).__name__} has no BatchNorm behind a convolution to fold.')
    for conv, norm in pairs:
        folded.set_submodule(conv, _folded(modules[conv], modules[norm]))
        rest = [modules[norm].drop, modules[norm].act] if isinstance(modules[norm], BatchNormAct2d) else []
        folded.set_submodule(norm, nn.Sequential(*rest).eval())
    return folded


def _pairs(model: nn.Module, modules: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Names of convolutions and of the norms that alone read them; each is called once."""
    try:
        graph = _Tracer().trace(model)
    except Exception as e:  # whatever a model does that is no graph
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f'fold_batchnorm: torch.fx cannot trace {type(model).__name__} ({reason}).') from e
    calls = [node for node in graph.nodes if node.op == 'call_module']
    targets = [node.target for node in calls]
    found = []
    for node in calls:
        before: Any = node.args[0] if node.args else None
        if type(modules[str(node.target)]) not in NORMS or before not in calls:
            continue
        once = len(before.users) == targets.count(before.target) == targets.count(node.target) == 1
        if once and type(modules[before.target]) in CONVS:
            found.append((before.target, str(node.target)))
    return found


def _is_exact(conv: nn.Conv2d, norm: Any) -> bool:
    if norm.running_var is None:
        return False
    return not isinstance(conv, ICConv2d) or norm.weight is None or bool((norm.weight >= 0).all())


@torch.no_grad()
def _folded(conv: Any, norm: Any) -> nn.Conv2d:
    new: Any = fuse_conv_bn_eval(conv, norm)
    if not isinstance(conv, ICConv2d):
        return new
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
