"""Hidden layers that belong to a timm classifier, and what becomes of them when a head takes its place.

Most families of timm have one linear as their classifier. Those with layers in front of it:

- VGG: two layers of 4,096, ``pre_logits``. A head takes the place of both, as in the papers' networks, and reads the
  map of 7 x 7 positions as one vector; 'linear' keeps them, being timm's own classifier.
- Families whose ``reset_classifier`` takes ``reset_other`` (ConvNeXt's norm and MLP, EfficientViT, MetaFormer, HGNet
  and others) keep what timm drops by it, unless asked.
- All others (MobileNetV3's and GhostNet's ``conv_head``) keep theirs, which timm counts among the features.

The option is ``head_reset_other``, named for timm's own: True drops them, False keeps them.
"""

import inspect
from typing import Any, Dict, Optional, Type

import torch
from timm.models import VGG
from torch import nn

from ..layers import ClassifierHead, SpinalHead
from ._feature_map import TimmModel

OPTION = 'head_reset_other'
VGG_HIDDEN = 'pre_logits.'  # names of VGG's hidden layers
VGG_GRID = 7
VGG_WIDTH = 1024  # of the spinal head's layers (docs/papers/spinalnet.md, section 3.4)


class MapVector(nn.Module):
    """Map (B, C, H, W) -> (B, C S S, 1, 1): averaged to S x S positions and flattened, as in torchvision's VGG.

    Args:
        size: Positions per side S.
    """

    def __init__(self, size: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x).flatten(1)[:, :, None, None]


def drops_hidden_layers(model: TimmModel, head: str, reset_other: Optional[bool]) -> bool:
    """Whether a head takes the place of the classifier's hidden layers too.

    Args:
        model: A timm model.
        head: A row of ``HEADS``.
        reset_other: What was asked for, None for the default.

    Raises:
        ValueError: They are to be dropped and timm knows none in this model.
    """
    if isinstance(model, VGG):
        return replaces_hidden_layers(head, reset_other)
    if reset_other and 'reset_other' not in inspect.signature(model.reset_classifier).parameters:
        name = model.pretrained_cfg.get('architecture') or type(model).__name__
        raise ValueError(f'{OPTION}=True: the classifier of {name} has no hidden layers that timm can drop; '
                         'leave the option out.')
    return bool(reset_other)


def replaces_hidden_layers(head: str, reset_other: Optional[bool]) -> bool:
    """Whether a head takes the place of VGG's hidden layers, so that weights may lack them.

    Args:
        head: A row of ``HEADS``.
        reset_other: What was asked for, None for the default.
    """
    return head != 'linear' if reset_other is None else reset_other


def check_hidden_layers(model: TimmModel, state_dict: Dict[str, torch.Tensor], whole_model: bool) -> None:
    """Refuse weights of the other form: a head behind hidden layers for one in their place.

    Args:
        model: A model with a head.
        state_dict: The weights, empty for none.
        whole_model: They are those of a model with a head.

    Raises:
        RuntimeError: They are of the other form, or lack layers of the backbone.
    """
    if not (isinstance(model, VGG) and state_dict):
        return
    if whole_model and isinstance(model.pre_logits, (MapVector, nn.Identity)) and any(
            name.startswith(VGG_HIDDEN) for name in state_dict):
        raise RuntimeError(f'In these weights the head is behind the hidden layers of VGG; pass {OPTION}=False.')
    lacking = [name for name in model.features.state_dict() if f'features.{name}' not in state_dict]
    if lacking:
        raise RuntimeError(f'The weights lack {len(lacking)} keys of the backbone, such as features.{lacking[0]}.')


def drop_hidden_layers(model: TimmModel, keep_map: bool) -> None:
    """Take the hidden layers of the classifier out, in place; ``head_hidden_size`` is what is in front of them.

    Args:
        model: A model without classes.
        keep_map: The head reads the map.
    """
    if not isinstance(model, VGG):
        model.reset_classifier(0, **(dict(global_pool='') if keep_map else {}), reset_other=True)
        return
    pre_logits: Any = nn.Identity() if keep_map else MapVector(VGG_GRID)
    model.pre_logits = pre_logits
    width = model.num_features * (1 if keep_map else VGG_GRID ** 2)
    model.head.in_features = model.head.num_features = model.head_hidden_size = width


def width_in_front(model: TimmModel) -> int:
    """Width that a vector head reads where the hidden layers are dropped, as far as it is known before."""
    return model.num_features * VGG_GRID ** 2 if isinstance(model, VGG) else model.num_features


def head_defaults(model: TimmModel, head_cls: Type[ClassifierHead]) -> Dict[str, Any]:
    """Options of a vector head in the place of a classifier's hidden layers: the papers' width for VGG."""
    return dict(width=VGG_WIDTH) if isinstance(model, VGG) and issubclass(head_cls, SpinalHead) else {}
