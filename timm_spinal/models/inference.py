"""Forms of a trained model for inference: BatchNorm folded into convolutions, capsule layers packed into bits."""

import copy
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.fx
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import CapsuleHead
from ._timm import update_model_args
from .attach_head import HEAD_NAME
from .convolutions import CONVOLUTIONS

PLAIN = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


class _Tracer(torch.fx.Tracer):
    """Does not look into convolutions and norms, nor into what timm's own tracing leaves whole."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = _conv_classes() + NORMS + tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.leaves or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy without the BatchNorm layers that directly follow a convolution, where that is exact.

    The copy computes the same in eval mode. It is for inference only: its state dict has other keys than the model.

    Args:
        model: A model that torch.fx can trace, as timm's CNNs, in eval mode; it is not changed.

    Raises:
        ValueError: If the model is in training mode, cannot be traced, or has nothing to fold.
    """
    if any(module.training for module in model.modules()):
        raise ValueError('fold_batchnorm: the model is in training mode, where its BatchNorms depend on the batch; '
                         'call model.eval() first.')
    folded = copy.deepcopy(model)
    modules: Dict[str, Any] = dict(folded.named_modules())
    count = 0
    for conv, norm in _pairs(folded, modules):
        new = _folded(modules[conv], modules[norm])
        if new is None:
            continue
        count += 1
        folded.set_submodule(conv, new)
        rest = [modules[norm].drop, modules[norm].act] if isinstance(modules[norm], BatchNormAct2d) else []
        folded.set_submodule(norm, nn.Sequential(*rest).eval())
    if not count:
        raise ValueError(f'fold_batchnorm: {type(model).__name__} has no BatchNorm behind a convolution to fold.')
    return folded


def _conv_classes() -> Tuple[Any, ...]:
    return PLAIN + tuple(row.layer for row in CONVOLUTIONS.values())


def _pairs(model: nn.Module, modules: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Names of convolutions and of the norms that alone read them; each is called once."""
    try:
        graph = _Tracer().trace(model)
    except Exception as e:  # whatever a model does that is no graph
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f'fold_batchnorm: torch.fx cannot trace {type(model).__name__} ({reason}).') from e
    calls = [node for node in graph.nodes if node.op == 'call_module']
    targets = [node.target for node in calls]
    classes = _conv_classes()
    pairs = []
    for node in calls:
        before: Any = node.args[0] if node.args else None
        if type(modules[str(node.target)]) not in NORMS or before not in calls:
            continue
        once = len(before.users) == targets.count(before.target) == targets.count(node.target) == 1
        if once and type(modules[before.target]) in classes:
            pairs.append((before.target, str(node.target)))
    return pairs


@torch.no_grad()
def _folded(conv: Any, norm: Any) -> Optional[nn.Conv2d]:
    """The convolution with the norm behind it, None where that is not exact; other kinds than nn.Conv2d know how."""
    if norm.running_var is None:
        return None
    if type(conv) in PLAIN:
        return fuse_conv_bn_eval(conv, norm)
    return conv.fold_batchnorm(norm) if hasattr(conv, 'fold_batchnorm') else None


def pack_xnodr(model: nn.Module) -> nn.Module:
    """Pack the capsule head of a trained model, in place: bits and scales for XnODR, an agreement of bits for XnIDR.

    Packing is for CPUs and for the size of files; on a GPU the float model is faster. Scores are those of the float
    model to 1e-5. The model cannot be trained any more. It is saved and loaded as any
    timm model; its ``config.json`` has the option ``head_packed``.

    Args:
        model: A model with an 'xnodr' or 'xnidr' head, attached or its own.

    Returns:
        The same model.

    Raises:
        ValueError: There is no such head, or it is packed already.
    """
    head = getattr(model, HEAD_NAME, None) or getattr(model, 'head', None)
    if not isinstance(head, CapsuleHead):
        raise ValueError(f"{type(model).__name__} has no capsule head; give a model with the head 'xnodr' or 'xnidr'.")
    head.pack()
    update_model_args(model, head_packed=True)
    return model
