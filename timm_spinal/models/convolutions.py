"""The kinds of convolution that can stand in the place of ``nn.Conv2d`` in any CNN of timm: one table, a row a kind.

A row is all that the package knows of its kind: `convert` puts it into a model, `convolution_variants.py` registers the
names ``<prefix><timm model>``, and weights, model cards and tests read it. A new kind is a layer, a row and its tests.
Shared filter bases are no row: they replace the filters of a whole stage at once, not one convolution.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple, Type

from timm.models import is_model
from torch import nn

from ..layers import ICConv2d, Table
from .ic_collisions import start_collisions


@dataclass(frozen=True)
class Convolution:
    """A kind of convolution.

    Attributes:
        prefix: Prefix of model names (``icresnet50``) and, with an underscore, of options (``ic_mode``) and of the
            tensors that the layer adds to those of ``nn.Conv2d`` (``ic_weight``).
        layer: A subclass of ``nn.Conv2d`` with its arguments, its ``weight`` and its ``bias``, so that weights of plain
            models fit. Options are further arguments, with defaults that are strings, numbers or booleans. Where it
            adds tensors, its ``reset_added_parameters()`` starts them. Its ``fold_batchnorm(norm)``, if it has one,
            gives a copy with the norm behind it folded in, None where that is not exact.
        title: In descriptions of models: 'resnet50 with ... convolutions'.
        noun: In messages, for the tensors that the layer adds.
        paper: arXiv number of the paper, '' for none.
        backbones: timm models whose converted forms are registered on import; other ones are registered when needed.
        scope: Which convolutions of a model are replaced by default, see :func:`convert`.
        depthwise: Whether depthwise convolutions are replaced by default.
        start: Called with a model that has the plain model's weights and with the options that were given: starts the
            added tensors so that the model computes nearly what the plain one does, and returns whether it did. Without
            it they stay as in a new layer.
        refit: What makes the plain model's BatchNorm statistics fit again, for a message.
    """
    prefix: str
    layer: Type[nn.Conv2d]
    title: str
    noun: str
    paper: str = ''
    backbones: Tuple[str, ...] = ()
    scope: str = 'spatial'
    depthwise: bool = False
    start: Optional[Callable[[nn.Module, Dict[str, Any]], bool]] = None
    refit: str = 'timm_spinal.recalibrate_bn'

    @property
    def label(self) -> str:
        """Short name in messages, 'IC'."""
        return self.prefix.upper()

    @functools.cached_property
    def options(self) -> Dict[str, Any]:
        """Options of ``create_model`` and their defaults: two of :func:`convert`, and the layer's own."""
        arguments = inspect.signature(self.layer).parameters
        own = {name: p.default for name, p in arguments.items() if name.startswith(f'{self.prefix}_')}
        return {f'{self.prefix}_scope': self.scope, f'{self.prefix}_depthwise': self.depthwise, **own}

    def adds(self, name: str) -> bool:
        """Whether a tensor of this name is one that the plain model does not have."""
        return f'.{self.prefix}_' in name


_ROWS = (
    Convolution(
        prefix='ic',
        layer=ICConv2d,
        title='inter-layer collision',
        noun='collision',
        paper='2102.03495',
        backbones=(
            'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnext50_32x4d', 'seresnet50',
            'resnet20_cifar', 'resnet32_cifar', 'resnet56_cifar',
        ),
        start=start_collisions,
        refit='timm_spinal.ic_warm_start or recalibrate_bn',
    ),
)
CONVOLUTIONS: Dict[str, Convolution] = Table('convolution', {row.prefix: row for row in _ROWS})


def convolution_of(name: str) -> Optional[Convolution]:
    """The row whose prefix and a known model of timm make a model's name, None for none."""
    for prefix, row in CONVOLUTIONS.items():
        plain = name.removeprefix(prefix)
        if plain != name and (is_model(plain) or is_model(plain.rpartition('_')[0])):
            return row
    return None
