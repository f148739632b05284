"""Variants of a comparison by name, and MLP controls with as many parameters as another head."""
import ast
import difflib
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from timm_spinal.cost import count_params
from timm_spinal.errors import UserError
from timm_spinal.layers import HEADS, create_head, equal_size_mlp_width, head_needs_feature_map, head_options

from .fitted import FITTED

CONTROL = 'mlp'
# what torch and timm raise where a value of an option makes no sense
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Variant:
    """One head of a comparison.

    Attributes:
        name: What the user wrote: 'spinal', 'spinal:width=256', 'mlp=spinal'.
        head: Name of the head, or of a fitted control.
        options: Options of the head, without prefix.
        sized_as: Name of the variant whose parameter count this control matches, or ''.
    """
    name: str
    head: str
    options: dict[str, Any] = field(default_factory=dict)
    sized_as: str = ''


def parse_variants(text: str) -> list[Variant]:
    """Variants from ``linear,mlp,spinal:width=256``.

    A plain ``mlp`` becomes one control for every trained head that is neither linear nor an MLP, or stays a plain MLP
    where there is none. Widths of the controls are set by `size_controls`.

    Raises:
        UserError: An unknown head or option, a repeated variant, or an empty list.
    """
    names = [part.strip() for part in text.split(',') if part.strip()]
    if not names:
        raise UserError(f'--heads {text!r}: no heads; write for instance --heads linear,mlp,spinal')
    heads = [name for name in names if name.split(':')[0] not in ('linear', CONTROL, *FITTED) and not _is_sized(name)]
    expanded: list[str] = []
    for name in names:
        expanded += [f'{CONTROL}={head}' for head in heads] or [name] if name == CONTROL else [name]
    expanded = list(dict.fromkeys(expanded)) if CONTROL in names else expanded
    repeated = {name for name in expanded if expanded.count(name) > 1}
    if repeated:
        raise UserError(f'--heads: {min(repeated)} is given twice; remove one')
    variants = [_parse_variant(name) for name in expanded]
    for variant in variants:
        if variant.sized_as.split(':')[0] in FITTED:
            raise UserError(f'--heads: {variant.name}: {variant.sized_as} is not trained and has no size; leave it out')
        if variant.sized_as and variant.sized_as not in expanded:
            raise UserError(f'--heads: {variant.name} takes its size from {variant.sized_as}, which is not in the '
                            f'list; add {variant.sized_as}')
    return variants


def size_controls(
        variants: list[Variant],
        in_features: int,
        num_classes: int,
        map_channels: int = 0,
) -> list[Variant]:
    """Give each sized control the width that brings it nearest to its head's parameter count.

    Args:
        variants: From `parse_variants`.
        in_features: Width of the pooled vector.
        num_classes: Number of classes.
        map_channels: Channels of the feature map, for heads that take it.

    Raises:
        UserError: A value of an option that the head refuses.
    """
    by_name = {variant.name: variant for variant in variants}
    sized = []
    for variant in variants:
        if variant.sized_as:
            like = by_name[variant.sized_as]
            width = map_channels if needs_feature_map(like) else in_features
            size = count_params(new_head(like, width, num_classes, device='meta'))
            width = equal_size_mlp_width(size, in_features, num_classes)
            variant = replace(variant, options=dict(variant.options, width=width))
        if variant.head not in FITTED:
            new_head(variant, map_channels if needs_feature_map(variant) else in_features, num_classes, device='meta')
        sized.append(variant)
    return sized


def new_head(variant: Variant, in_features: int, num_classes: int, device: Any = None) -> nn.Module:
    """A head with new weights from torch's global generator.

    Raises:
        UserError: A value of an option that the head refuses.
    """
    try:
        return create_head(variant.head, in_features, num_classes, device=device, **variant.options)
    except REFUSALS as e:
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise UserError(f'head {variant.name}: {reason}; change its options') from e


def needs_feature_map(variant: Variant) -> bool:
    """Whether a variant reads the feature map, or the tokens, and not the pooled vector."""
    return variant.head not in FITTED and head_needs_feature_map(variant.head, **variant.options)


def reads_tokens(variant: Variant) -> bool:
    """Whether a variant that needs the feature map takes tokens too."""
    if not needs_feature_map(variant):
        return False
    head_cls: Any = HEADS[variant.head]  # that of a test may have no such attributes
    return getattr(head_cls, 'reads_tokens', False) and not getattr(head_cls, 'averages_map', False)


def is_control(variant: Variant) -> bool:
    """Whether a variant is one that the papers' heads are measured against."""
    return variant.head in FITTED or getattr(HEADS[variant.head], 'is_control', False)


def for_tokens(variant: Variant, num_prefix_tokens: int) -> Variant:
    """The variant on a backbone that gives tokens and no map."""
    if not reads_tokens(variant):
        return variant
    return replace(variant, options=dict(
        variant.options, input_fmt='NLC', num_prefix_tokens=num_prefix_tokens))


def slug(name: str) -> str:
    """A variant's name as the name of a folder."""
    return re.sub(r'[^\w.=-]+', '-', name)


def _is_sized(name: str) -> bool:
    return name.startswith(f'{CONTROL}=')


def _parse_variant(name: str) -> Variant:
    if _is_sized(name):
        return Variant(name, CONTROL, sized_as=name.partition('=')[2])
    head, *pairs = name.split(':')
    heads = [*HEADS, *FITTED]
    if head not in heads:
        near = difflib.get_close_matches(head, heads, n=1)
        hint = f'did you mean {near[0]}?' if near else f'heads are {", ".join(heads)}'
        raise UserError(f'unknown head {head!r}; {hint}')
    known: Any = FITTED[head].grid if head in FITTED else head_options(head)
    options = {}
    for pair in pairs:
        key, sep, value = pair.partition('=')
        if not sep or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean {near[0]}?' if near else f'its options are {", ".join(known) or "none"}'
            reason = f'head {head} has no option {key!r}' if sep else f'{pair!r} is not of the form option=value'
            raise UserError(f'--heads {name}: {reason}; {hint}')
        options[key] = _literal(value)
    return Variant(name, head, options)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {'true': True, 'false': False}.get(text.lower(), text)


def new_heads(variant: Variant, in_features: int, num_classes: int, seeds: list[int]) -> list[nn.Module]:
    """One head for each seed; initial weights depend on the variant and the seed alone."""
    heads = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            heads.append(new_head(variant, in_features, num_classes))
    return heads
