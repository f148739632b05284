"""Which parts of a model are not trained.

The head is the submodule `attached_head` of models made by `timm_spinal.attach_head`, or `head` where it has hidden
layers as the small nets' have, else what timm's `get_classifier()` returns. Everything else is the backbone.
"""
import difflib
from dataclasses import dataclass, field
from typing import Any, Iterable, Sequence

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_spinal.errors import UserError


@dataclass(frozen=True)
class Freeze:
    """What of the backbone stays as it is: its weights, its BatchNorm (scale, shift and running statistics)."""
    weights: bool
    batch_norm: bool


FREEZES = {
    'none': Freeze(weights=False, batch_norm=False),
    'bn': Freeze(weights=False, batch_norm=True),
    'backbone': Freeze(weights=True, batch_norm=True),
    'backbone-except-bn': Freeze(weights=True, batch_norm=False),
}


def apply_freeze(model: nn.Module, name: str, modules: Sequence[str] = ()) -> list[nn.Module]:
    """Freeze parts of a model in place.

    Args:
        model: A timm model.
        name: One of `FREEZES`.
        modules: Names of further modules to freeze with all that is in them, BatchNorm too.

    Returns:
        The BatchNorm layers that must be put back into eval mode after every ``model.train()``.

    Raises:
        UserError: A module that does not exist, or nothing would be left to train.
    """
    freeze = FREEZES[name]
    in_head = {id(m) for head in _heads(model) for m in head.modules()}
    frozen_norms = []
    for module in model.modules():
        if id(module) in in_head:
            continue
        is_norm = isinstance(module, _BatchNorm)
        if freeze.batch_norm if is_norm else freeze.weights:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if is_norm:
                frozen_norms.append(module)
    for part in _named_parts(model, modules):
        part.requires_grad_(False)
        frozen_norms += [m for m in part.modules() if isinstance(m, _BatchNorm) and m not in frozen_norms]
    if not any(p.requires_grad for p in model.parameters()):
        if modules:
            raise UserError(f'freeze-modules {" ".join(modules)}: nothing is left to train; name fewer')
        raise UserError(f'freeze {name}: the model has no classifier, so nothing is left to train; use --freeze none')
    return frozen_norms


@dataclass
class HeadFirst:
    """A backbone that joins the training of its head late: weights, and BatchNorm with its statistics, wait.

    Attributes:
        epochs: Epochs in which the head trains alone.
        weights: Weights of the backbone that train afterwards.
        norms: Its BatchNorm layers.
    """
    epochs: int = 0
    weights: list[nn.Parameter] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    held: bool = False

    def begin_epoch(self, epoch: int, backward: bool) -> None:
        """Hold the backbone or let it go; call it when the model is in train mode.

        Args:
            epoch: The epoch that begins.
            backward: Gradients of the weights that are held are computed all the same, for DistributedDataParallel,
                which waits for them; `drop_gradients` keeps them from the optimizer.
        """
        self.held = epoch < self.epochs
        for weight in self.weights:
            weight.requires_grad_(backward or not self.held)
        for norm in self.norms if self.held else ():
            norm.eval()

    def drop_gradients(self) -> None:
        """Leave the optimizer no gradients of weights that are held: it then passes over them."""
        if self.held:
            for weight in self.weights:
                weight.grad = None


def head_first(model: nn.Module, epochs: int) -> HeadFirst:
    """What waits while the head of a model trains alone for some epochs.

    Args:
        model: A timm model; weights that do not train at all need no gradients already.
        epochs: Epochs in which the head trains alone, 0 for none.

    Raises:
        UserError: The model has no head that trains.
    """
    if not epochs:
        return HeadFirst()
    in_head = {id(part) for head in _heads(model) for part in (*head.modules(), *head.parameters())}
    if not any(p.requires_grad for p in model.parameters() if id(p) in in_head):
        raise UserError('--freeze-epochs: the model has no classifier that trains; leave it out')
    return HeadFirst(
        epochs,
        [p for p in model.parameters() if p.requires_grad and id(p) not in in_head],
        [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in in_head],
    )


def _named_parts(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean {near[0]}?' if near else 'give a name of named_modules()'
            raise UserError(f'freeze-modules: the model has no module {name!r}; {hint}')
    return [known[name] for name in names]


def _heads(model: Any) -> Iterable[nn.Module]:
    if hasattr(model, 'attached_head'):
        return [model.attached_head]
    if hasattr(getattr(model, 'head', None), 'hidden'):
        return [model.head]
    classifier = model.get_classifier()
    return classifier if isinstance(classifier, (tuple, list)) else [classifier]
