"""``load_state_dict`` of a model that timm is making: weights that fit are loaded, the others reported or refused.

timm reads weights, renames them by the filter of the model's family and adapts the first convolution. It drops a
classifier where the number of classes differs, and then loads with ``strict=False`` and reports nothing. So the last
step, ``load_state_dict``, is replaced while timm makes the model.
"""

import contextlib
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from timm.models import ResNet
from torch import nn

from .weight_files import MisfitError, first_names

State = Dict[str, torch.Tensor]
Names = Union[str, Sequence[str], None]

HEAD_PARTS = ('fc_norm',)  # timm's norm of the pooled vector, which a model with another pooling does not have
COUNTER = '.num_batches_tracked'  # files of old versions of torch lack it, and torch fills it in


@dataclass
class LoadedWeights:
    """Report of loaded weights.

    Attributes:
        source: The name or file that they are from.
        loaded: Number of the model's tensors that were loaded.
        left_out: Names in the source that were not loaded.
        new: Names in the model that the source does not have.
        classes: Number of classes of a classifier in the source that does not fit.
    """
    source: str
    loaded: int = 0
    left_out: List[str] = field(default_factory=list)
    new: List[str] = field(default_factory=list)
    classes: Optional[int] = None

    def __str__(self) -> str:
        text = f'{self.source}: {self.loaded} tensors loaded'
        for what, names in (('left out', self.left_out), ('new', self.new)):
            text += f', {len(names)} {what} ({first_names(names)})' if names else f', none {what}'
        return text

    def as_dict(self) -> Dict[str, Any]:
        """The report for result.json."""
        return dict(source=self.source, loaded=self.loaded, left_out=self.left_out, new=self.new)


@dataclass
class _Load:
    """Rules for the next weights that are loaded.

    Attributes:
        report: Filled while they are loaded.
        classifier: Names of the model's classifiers.
        enforce: Refuse weights that lack tensors of the backbone.
        features: The model is made for ``features_only``, without a head.
    """
    report: LoadedWeights
    classifier: Names = None
    enforce: bool = False
    features: bool = False
    done: bool = False


_load: ContextVar[Optional[_Load]] = ContextVar('load', default=None)


@contextlib.contextmanager
def watch_load(
        source: str,
        classifier: Names = None,
        enforce: bool = False,
        features: bool = False,
) -> Iterator[LoadedWeights]:
    """A context in which timm makes a model: its weights are loaded by the rules of this module, and reported.

    Nested contexts share the report of the outer one; the inner one sets the rules.

    Args:
        source: Name of the weights in messages.
        classifier: Names of the model's classifiers, which need not fit.
        enforce: Refuse weights that lack tensors of the backbone. Otherwise timm's own rules hold.
        features: The model is made for ``features_only``: weights of a head are left out.
    """
    outer = _load.get()
    if outer is not None:
        outer.classifier, outer.enforce, outer.features = classifier, enforce, features
        yield outer.report
        return
    load = _Load(LoadedWeights(source), classifier, enforce, features)
    token, plain = _load.set(load), nn.Module.load_state_dict

    def load_state_dict(module: nn.Module, state_dict: Any, strict: bool = True, *args: Any, **kwargs: Any) -> Any:
        if load.done or _load.get() is not load or not hasattr(module, 'pretrained_cfg'):
            return plain(module, state_dict, strict, *args, **kwargs)
        load.done = True
        if load.enforce:
            state_dict, strict = _fitting(module, dict(state_dict), strict, load), False
        result = plain(module, state_dict, strict, *args, **kwargs)
        missing = [name for name in result.missing_keys if not name.endswith(COUNTER)]
        load.report.loaded += len(state_dict) - len(result.unexpected_keys)
        load.report.left_out += result.unexpected_keys
        head = _head_prefixes(load.classifier)[1] if load.features else ()
        load.report.new += [name for name in missing if not name.startswith(head)]
        return type(result)([], []) if load.enforce else result

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
    try:
        yield load.report
    finally:
        nn.Module.load_state_dict = plain  # type: ignore[method-assign]
        _load.reset(token)


def _fitting(model: nn.Module, state_dict: State, strict: bool, load: _Load) -> State:
    """The weights that fit the model; the others go into the report."""
    if isinstance(model, ResNet):
        state_dict = plain_resnet_names(state_dict)
    check_backbone(model, state_dict, load.report.source, load.classifier, strict)
    own = model.state_dict()
    fits = {name: value for name, value in state_dict.items() if name in own and same_shape(own[name], value)}
    classifier, head = _head_prefixes(load.classifier)
    hidden = [name for name in own if name.startswith(head) and not name.startswith(classifier)]
    if load.features or not fits.keys() >= set(hidden):  # the model has no head, or another one
        fits = {name: value for name, value in fits.items() if not name.startswith(head)}
    left_out = [name for name in state_dict if name not in fits]
    load.report.left_out += left_out
    load.report.classes = next(
        (len(state_dict[name]) for name in left_out if name in own and name.startswith(classifier)), None)
    return fits


def check_backbone(model: nn.Module, state_dict: State, source: str, classifier: Names, strict: bool = True) -> None:
    """Refuse weights that lack tensors of the backbone, or that are of a larger one.

    Args:
        model: Any model.
        state_dict: The weights, under the model's names.
        source: Name of the weights in messages.
        classifier: Names of the model's classifiers. The modules that they are in need not fit.
        strict: Refuse those of a larger backbone too.

    Raises:
        MisfitError: Counts, and the first names on both sides.
    """
    own = model.state_dict()
    head = _head_prefixes(classifier)[1]
    backbone = [name for name in own if not name.startswith(head) and not name.endswith(COUNTER)]
    lacking = [name for name in backbone if name not in state_dict or not same_shape(own[name], state_dict[name])]
    others = [name for name in state_dict if name not in own and not name.startswith(head)]
    parts = {name.split('.')[0] for name in own}
    larger = [name for name in others if name.split('.')[0] in parts and state_dict[name].numel() > 1]
    if lacking or (strict and larger) or not own.keys() & state_dict.keys():
        raise does_not_fit(source, model, state_dict, lacking, larger or others, len(backbone), 'backbone')


def same_shape(own: torch.Tensor, value: torch.Tensor) -> bool:
    return own.shape == value.shape or own.ndim == 0 and value.shape == (1,)  # as torch takes it


def _head_prefixes(classifier: Names) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Prefixes of the tensors of classifiers, and of the modules that the classifiers are in."""
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    around = {name.rpartition('.')[0] or name for name in names} | set(HEAD_PARTS)
    return tuple(f'{name}.' for name in names), tuple(f'{name}.' for name in sorted(around))


def does_not_fit(
        source: str,
        model: nn.Module,
        state_dict: State,
        lacking: List[str],
        extra: List[str],
        total: int,
        what: str,
) -> MisfitError:
    """The error that names tensors which a file lacks, and tensors which the model lacks.

    Args:
        source: The file.
        model: The model.
        state_dict: The weights in the file.
        lacking: Names in the model that the file does not fill.
        extra: Names in the file that the model has no place for.
        total: Tensors that the file should fill.
        what: The model, or its backbone.
    """
    own = model.state_dict()
    wrong = next((name for name in lacking if name in state_dict), None)
    parts = [f'they fill {total - len(lacking)} of {total} tensors of the {what}']
    if lacking:
        parts.append(f'the model also has {first_names(lacking)}')
    if wrong is not None:
        there, here = ('x'.join(map(str, t.shape)) or 'a number' for t in (state_dict[wrong], own[wrong]))
        parts.append(f'size mismatch: {wrong} is {there} in the file and {here} in the model')
    if extra:
        parts.append(f'the file has {len(extra)} that the model has no place for: {first_names(extra)}')
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    return MisfitError(f'{source}: the weights are not of {name}: {"; ".join(parts)}')


def plain_resnet_names(state_dict: State) -> State:
    """Names of ResNets in the style of torchvision's early copies, as the papers' baselines have them, to timm's."""
    renamed = {re.sub(r'^(layer\d\.\d+)\.shortcut\.', r'\1.downsample.', name): value
               for name, value in state_dict.items()}
    return {re.sub(r'^linear\.', 'fc.', name): value for name, value in renamed.items()}
