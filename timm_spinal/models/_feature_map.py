"""The shape and format of the last feature map of a timm model, for heads that read it."""

import copy
import inspect
from typing import Any, Callable, Dict, NamedTuple, Optional, Type

import torch
from timm.models import ResNet, get_model_args
from torch import nn

from ..layers import ClassifierHead

TimmModel = Any  # an nn.Module with timm's attributes, for which timm has no type
MAP_POOLS = ('avg', 'fast', 'fastavg')  # timm's names of the average, which is what such a head computes itself


class FeatureMap(NamedTuple):
    """Channels of what a model gives without pooling, its format 'NCHW', 'NHWC' or 'NLC' (tokens), and of tokens the
    number of class and register tokens in front of the others, and that of the others."""

    channels: int
    input_fmt: str
    num_prefix_tokens: int = 0
    num_tokens: int = 0


def find_feature_map(
        model: TimmModel,
        unpool: Callable[[TimmModel], None],
        head_cls: Type[ClassifierHead],
) -> FeatureMap:
    """Find the map, or the tokens, that a model gives without pooling, by a forward pass of a copy on the meta device.

    Args:
        model: Is not changed.
        unpool: Turns the pooling of a model off, in place.
        head_cls: The head that is to read it.

    Raises:
        ValueError: If the model gives nothing that the head reads, or pools otherwise than the head does.
    """
    name = model.pretrained_cfg.get('architecture') or type(model).__name__
    advice = "use a head that reads the pooled vector, such as 'pspinal'."
    if 'primary' in inspect.signature(head_cls).parameters:
        advice = advice[:-1] + ", or head_primary='vector', which cuts that vector into capsules."
    args = get_model_args(model)
    size = args.get('img_size') or model.pretrained_cfg['input_size'][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        twin = _meta_twin(model)
        unpool(twin)
        dtype = next(twin.parameters()).dtype
        with torch.no_grad():
            features = twin(torch.zeros(1, model.in_chans, height, width, device='meta', dtype=dtype))
    except Exception as e:  # each family of timm's raises another error
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f'{name} gives no feature map without pooling ({reason}); {advice}') from e
    is_tokens = isinstance(features, torch.Tensor) and features.ndim == 3
    if is_tokens and head_cls.reads_tokens:
        prefix = getattr(model, 'num_prefix_tokens', 0)
        return FeatureMap(features.shape[2], 'NLC', prefix, features.shape[1] - prefix)
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        kind = 'tokens' if is_tokens else 'no map'
        raise ValueError(f'{name} gives {kind}, but the head reads a feature map; {advice}')
    if head_cls.averages_map:
        check_map_pool(args.get('global_pool'))
    output_fmt = getattr(model, 'output_fmt', 'NCHW')
    return FeatureMap(features.shape[3 if output_fmt == 'NHWC' else 1], output_fmt)


def _meta_twin(model: TimmModel) -> TimmModel:
    memo: Dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to('meta'), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = b.to('meta')
    return copy.deepcopy(model, memo).eval()


def check_map_pool(global_pool: Optional[str]) -> None:
    """Refuse a pooling that is not the average, for a head that averages the map itself.

    Args:
        global_pool: timm's name; '' and None pass.

    Raises:
        ValueError: If it is another pooling.
    """
    if global_pool and global_pool not in MAP_POOLS:
        raise ValueError(
            f"A capsule head averages the feature map by itself, so global_pool cannot be '{global_pool}'; use 'avg', "
            "'' for the map without a head, or head_primary='vector', which reads the model's own pooling.")


def map_head_defaults(model: TimmModel, head_cls: Type[ClassifierHead], given: FeatureMap) -> Dict[str, Any]:
    """Options of a head that depend on the backbone: the block of capsule heads, the papers' for ResNets."""
    if 'primary' not in inspect.signature(head_cls).parameters:
        return {}
    if given.num_tokens:
        return dict(primary='tokens', capsules=given.num_tokens)
    return dict(primary='bottleneck') if isinstance(model, ResNet) else {}
