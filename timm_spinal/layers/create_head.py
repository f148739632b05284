"""Heads by name, with the papers' settings as named presets."""

import difflib
import functools
import inspect
from typing import Any, Dict, Iterable, Type

from .attention_heads import AttentionHead, MlDecoderHead
from .capsule_head import CapsuleHead, XnidrHead, XnodrHead
from .classifier_head import ClassifierHead
from .control_heads import LinearHead, MlpHead
from .primary_capsules import VECTOR
from .progressive_spinal_head import ProgressiveSpinalHead
from .spinal_head import SpinalHead


class Table(Dict[str, Any]):
    """Rows by name. A name that it does not have raises a ValueError with the known names and the nearest one.

    Args:
        kind: What a row is, for the message.
        rows: The rows.
    """

    def __init__(self, kind: str, rows: Dict[str, Any]):
        super().__init__(rows)
        self.kind = kind

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"Unknown {self.kind} '{name}'; {self.kind}s are {', '.join(self)}.{nearest(name, self)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the known name that is nearest to a wrong one, '' where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ''


HEADS: Dict[str, Type[ClassifierHead]] = Table('head', {
    'linear': LinearHead,
    'mlp': MlpHead,
    'attn': AttentionHead,
    'mldecoder': MlDecoderHead,
    'spinal': SpinalHead,
    'pspinal': ProgressiveSpinalHead,
    'caps': CapsuleHead,
    'xnodr': XnodrHead,
    'xnidr': XnidrHead,
})

_PLAIN = dict(dropout=0., norm_layer='')  # the papers' 'ResNet style'

# Settings of the papers' scripts, by style and by data set (docs/papers/spinalnet.md, sections 2, 3, 3.4 and 3.5, and
# docs/papers/progressive_spinalnet.md, section 3).
HEAD_PRESETS: Dict[str, Dict[str, Dict[str, Any]]] = {
    'spinal': {
        'vgg': dict(dropout=0.5, norm_layer='batchnorm1d'),
        'resnet': _PLAIN,
        'cifar_vgg': dict(dropout=0.5, norm_layer=''),
        'cifar_cnn': dict(width=128, dropout=0.1, norm_layer=''),
        'customizable': dict(layers=10, splits=2, width=512, **_PLAIN),
        'shared': dict(layers=8, splits=8, width=20, shared=True, **_PLAIN),
        'stl10': dict(width=512),
        'cifar100': dict(width=512),
        'bird225': dict(width=1024),
        'caltech101': dict(width=1024),
        'cifar10': dict(width=20, **_PLAIN),
        'cinic10': dict(width=20, **_PLAIN),
        'fruits360': dict(width=131, **_PLAIN),
        'oxford102': dict(width=102, **_PLAIN),
        'stanford_cars': dict(width=196, **_PLAIN),
        'mnist_vgg5': dict(width=128),
    },
    'pspinal': {
        'vanilla_mnist': dict(width=128, norm_layer='batchnorm1d'),
        'kmnist': dict(width=64),
        'emnist_digits': dict(width=64),
        'emnist_letters': dict(width=128),
        'qmnist': dict(width=64, dropout=0.5, norm_layer='batchnorm1d'),
        'caltech101': dict(width=200, skip_dropout=0.35),
        'bird250': dict(width=1024),
        'fruits360': dict(width=1024),
        'stl10': dict(width=1024),
    },
}


# by the model, so no options
_GIVEN = ('in_features', 'num_classes', 'input_fmt', 'num_prefix_tokens', 'device', 'dtype')


@functools.cache
def _class_options(head_cls: Type[ClassifierHead]) -> Dict[str, Any]:
    parameters = inspect.signature(head_cls).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _GIVEN}


def head_options(head: str) -> Dict[str, Any]:
    """Options of a head and their defaults, without the ``head_`` prefix.

    Raises:
        ValueError: If the head is unknown.
    """
    head_cls: Any = HEADS[head]
    options = _class_options(head_cls)
    return dict(options, preset='') if head in HEAD_PRESETS else dict(options)


def head_needs_feature_map(head: str, primary: str = '', **options: Any) -> bool:
    """Whether a head with these options reads the feature map and not the pooled vector.

    Raises:
        ValueError: If the head is unknown.
    """
    return HEADS[head].needs_feature_map and primary != VECTOR


def create_head(
        head: str,
        in_features: int,
        num_classes: int,
        preset: str = '',
        input_fmt: str = 'NCHW',
        num_prefix_tokens: int = 0,
        device=None,
        dtype=None,
        **options: Any,
) -> ClassifierHead:
    """Create a head by name.

    Args:
        head: A row of ``HEADS``.
        in_features: Width F of the pooled vector, or channels of the map.
        num_classes: Number of classes C, 0 for none.
        preset: Name of a row of ``HEAD_PRESETS[head]``; explicit options override it.
        input_fmt: Format of the map, 'NCHW' or 'NHWC', or 'NLC' for tokens; heads that read a vector do not look at it.
        num_prefix_tokens: Class and register tokens in front of the others, for heads that read tokens.
        **options: The head's own options, see :func:`head_options`.

    Raises:
        ValueError: If the head, the preset or a value is unknown or out of range.
        TypeError: If the head has no such option.
    """
    head_cls: Any = HEADS[head]
    known = _class_options(head_cls)
    for name in options:
        if name not in known:
            raise TypeError(
                f"Head '{head}' has no option '{name}'; its options are {', '.join(head_options(head)) or 'none'}."
                f'{nearest(name, known)}')
    if preset:
        presets = HEAD_PRESETS.get(head, {})
        if preset not in presets:
            raise ValueError(
                f"Head '{head}' has no preset '{preset}'; its presets are {', '.join(presets) or 'none'}."
                f'{nearest(preset, presets)}')
        options = dict(presets[preset], **options)
    if head_cls.needs_feature_map:
        options['input_fmt'] = input_fmt
    if getattr(head_cls, 'reads_tokens', False):
        options['num_prefix_tokens'] = num_prefix_tokens
    return head_cls(in_features, num_classes, device=device, dtype=dtype, **options)
