"""Put a head in the place of the classifier of a model that timm has built.

Every timm classification model drops its classifier by ``reset_classifier(0)`` and then returns its pooled embedding.
The model's class is replaced by a subclass that sends this embedding through a head, the submodule ``attached_head``.
Names of backbone parameters do not change, the head's come last.
A head that reads the feature map or the tokens (its ``needs_feature_map``) gets what the model gives by
``reset_classifier(0, '')``.
"""

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

import torch
from timm.layers import get_device_dtype
from timm.models import VGG, get_model_args
from torch import nn

from ..layers import HEADS, ClassifierHead, create_head, head_needs_feature_map, head_options
from ._feature_map import TimmModel, check_map_pool, find_feature_map, map_head_defaults
from ._hidden_layers import OPTION as RESET_OTHER
from ._hidden_layers import drop_hidden_layers, drops_hidden_layers, head_defaults, width_in_front
from ._timm import get_own_args, set_own_args, update_model_args

HEAD_NAME = 'attached_head'
CLASSIFIER_NAME = f'{HEAD_NAME}.fc'
# what a timm classifier has
_NEEDED = ('pretrained_cfg', 'num_classes', 'head_hidden_size', 'forward_head', 'reset_classifier', 'get_classifier')


class HeadedModel:
    """What :func:`attach_head` mixes into a timm class, in front of it in the method resolution order.

    ``pooled`` is the timm class's own ``forward_head``. Without a classifier it returns the pooled embedding, or the
    feature map if the head reads that. With several classifiers it would average the input of each, so it is called
    for its pre-logits. With pooling off (``global_pool=''``) the model returns its feature map, as in timm, and the
    head is not used.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations at run time
        attached_head: ClassifierHead
        unpooled: bool
        several_classifiers: bool
        num_classes: int
        head_hidden_size: int
        backbone_cls: Type[Any]
        pooled: Callable[..., torch.Tensor]
        pretrained_cfg: Dict[str, Any]

    def forward_head(self, x, pre_logits: bool = False):
        x = self.pooled(x, self.several_classifiers)
        if self.unpooled:
            return x
        return self.attached_head(x, pre_logits)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        """The last linear, or its name."""
        return CLASSIFIER_NAME if name_only else self.attached_head.fc

    @torch.jit.ignore
    def reset_classifier(
            self,
            num_classes: int,
            global_pool: Optional[str] = None,
            reset_other: bool = False,
    ) -> None:
        """Replace the last linear.

        Args:
            num_classes: Number of classes, 0 for none: the model then returns the pre-logits.
            global_pool: Pooling type, the current one is kept if None. With '' the model returns its feature map.
                A head that reads the map averages it by itself and takes 'avg' or ''.
            reset_other: Drop the head's hidden layers, and what timm drops of its own pre-classifier layers.

        Raises:
            ValueError: A number of classes or a pooling that the head cannot take.
        """
        dd = get_device_dtype(self)
        needs_map = self.attached_head.needs_feature_map
        unpooled = self.unpooled if global_pool is None else not global_pool
        if needs_map and self.attached_head.averages_map:
            check_map_pool(global_pool)
        self.attached_head.check_classes(num_classes, reset_other)
        _reset_backbone(self, '' if needs_map else global_pool, reset_other)
        self.unpooled = unpooled
        in_features = None if unpooled or (needs_map and not reset_other) else self.head_hidden_size
        self.attached_head.reset(num_classes, reset_other=reset_other, in_features=in_features, **dd)
        self.num_classes = num_classes
        if not self.unpooled:
            self.head_hidden_size = self.attached_head.hidden_size

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters without weight decay: those of the backbone and those of the head."""
        of_backbone = super().no_weight_decay() if hasattr(self.backbone_cls, 'no_weight_decay') else ()  # type: ignore
        of_head: Set[str] = getattr(self.attached_head, 'no_weight_decay', set)()
        return {*of_backbone, *(f'{HEAD_NAME}.{name}' for name in of_head)}

    @torch.jit.ignore
    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> List[int]:
        """As timm's; where it takes the classifier away, the head's hidden layers go too."""
        self.head_hidden_size = self.attached_head.in_features
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        if self.num_classes == 0:
            self.attached_head.reset(0, reset_other=True)
        if not self.unpooled:
            self.head_hidden_size = self.attached_head.hidden_size
        return kept

    def __reduce__(self) -> Tuple[Any, ...]:
        return _new_headed_model, (self.backbone_cls,), self.__dict__


class HeadedMaskedModel(HeadedModel):
    """For timm classes whose ``forward_head`` takes more than features, such as the mask of valid patches."""

    def forward_head(self, *args: Any, pre_logits: bool = False, **kwargs: Any) -> torch.Tensor:
        x = self.pooled(*args, pre_logits=self.several_classifiers, **kwargs)
        return x if self.unpooled else self.attached_head(x, pre_logits)


class HeadedDistilledModel(HeadedModel):
    """For timm classes with a classifier for a teacher, which one head replaces too."""

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Refused: the head has one output, and token distillation needs two."""
        if enable:
            raise ValueError(
                f'{self.pretrained_cfg["architecture"]} has one head and no second classifier for token distillation; '
                'use logit or feature distillation.')


def attach_head(model: TimmModel, head: str, num_classes: Optional[int] = None, **options: Any) -> nn.Module:
    """Replace the classifier of a timm model by a head, in place.

    Backbone parameters keep their names and values, the model its device, dtype, mode and frozen parameters; the head
    is new and trainable. timm's interface still works: ``reset_classifier``, ``get_classifier``, ``forward_head``,
    ``head_hidden_size``, ``save_for_hf``, copying and pickling. A head that was attached before is replaced.

    Args:
        model: A model from ``timm.create_model``. Where timm averages several classifiers (distilled models), the head
            takes what timm calls the pre-logits: the average of their inputs, or their concatenation.
        head: A row of ``HEADS``. 'caps', 'xnodr', 'xnidr', 'attn' and 'mldecoder' need a model that gives a feature map
            or tokens.
        num_classes: Number of classes, the model's own if None.
        **options: The head's options, prefixed ``head_``, such as ``head_width=256`` or ``head_preset='caltech101'``.
            ``head_primary`` of a capsule head is 'bottleneck' on timm's ResNets, as in the paper.
            ``head_reset_other`` says whether the head takes the place of the hidden layers that a classifier has in
            front of its last linear: True by default for VGG (not for 'linear'), where a spinal head then has layers
            of 1,024, and False for the families whose ``reset_classifier`` takes ``reset_other``.

    Returns:
        The same model.

    Raises:
        ValueError: If the model cannot take a head, or the head or a value of an option is unknown.
        TypeError: If the head has no such option.
    """
    head_kwargs: Dict[str, Any] = {}
    for name, value in options.items():
        if not name.startswith('head_'):
            raise TypeError(f"Unknown option '{name}'; a head's options begin with 'head_', such as head_width.")
        head_kwargs[name[len('head_'):]] = value
    for name in _NEEDED:
        if not hasattr(model, name):
            raise ValueError(
                f'{type(model).__name__} cannot take a head: it has no {name}, so it is not a classifier of timm; pass '
                'what timm.create_model returns, without features_only.')
    if num_classes is None:
        num_classes = model.num_classes
    old_head = getattr(model, HEAD_NAME, None)
    in_features = model.head_hidden_size if old_head is None else old_head.in_features
    reset_other = head_kwargs.pop('reset_other', None)
    drops_hidden = old_head is None and (isinstance(model, VGG) or reset_other) and drops_hidden_layers(
        model, head, reset_other)
    needs_map = head_needs_feature_map(head, **head_kwargs)
    if needs_map:
        given = find_feature_map(model, functools.partial(_unpool, drop_hidden=drops_hidden), HEADS[head])
        in_features = given.channels
        head_kwargs = dict(map_head_defaults(model, HEADS[head], given), input_fmt=given.input_fmt,
                           num_prefix_tokens=given.num_prefix_tokens, **head_kwargs)
    elif drops_hidden:
        in_features = width_in_front(model)
        if 'preset' not in head_kwargs:
            head_kwargs = dict(head_defaults(model, HEADS[head]), **head_kwargs)
    new_head = create_head(head, in_features, num_classes, **head_kwargs, **get_device_dtype(model))

    # the model is changed from here on, so everything was checked before
    if old_head is None:
        classifier = model.pretrained_cfg.get('classifier') or ''
        model.several_classifiers = not isinstance(classifier, str) or isinstance(model.get_classifier(), tuple)
        # the config of a model with a head that reads the map says '', since the backbone does not pool
        model.unpooled = get_model_args(model).get('global_pool') == '' and not (needs_map and num_classes)
        model.reset_classifier(0, **({'global_pool': ''} if needs_map else {}))
        if drops_hidden:
            drop_hidden_layers(model, keep_map=needs_map)
        model.backbone_architecture = model.pretrained_cfg['architecture']
        backbone_cls: Any = type(model)
        model.__class__ = headed_cls(backbone_cls)
    else:
        _take_off(model, needs_map)
    if needs_map and isinstance(getattr(model, 'head', None), ClassifierHead):
        model.head.reset(0, reset_other=True)  # a small net's hidden layers would get no gradient
    if not needs_map and not model.unpooled and model.head_hidden_size != in_features:
        new_head.reset(num_classes, in_features=model.head_hidden_size)
    model.attached_head = new_head.train(model.training)
    model.num_classes = num_classes
    if not model.unpooled:
        model.head_hidden_size = new_head.hidden_size
    model.pretrained_cfg = model.default_cfg = dict(
        model.pretrained_cfg, architecture=f'{model.backbone_architecture}_{head}', classifier=CLASSIFIER_NAME)
    update_model_args(model, **options)  # what timm writes to config.json
    return model


def _take_off(model: TimmModel, needs_map: bool) -> None:
    """Prepare a model with a head for another one: return what that reads, and drop the old head's options."""
    unpooled = model.unpooled
    pool = 'avg' if model.attached_head.needs_feature_map and not unpooled else None
    _reset_backbone(model, '' if needs_map else pool, reset_other=False)
    model.unpooled = unpooled
    known = {f'head_{option}' for head in HEADS for option in head_options(head)} | {RESET_OTHER}
    set_own_args(model, {name: value for name, value in get_own_args(model).items() if name not in known})


def _unpool(model: TimmModel, drop_hidden: bool) -> None:
    _reset_backbone(model, '', reset_other=False)
    if drop_hidden:
        drop_hidden_layers(model, keep_map=True)


def _reset_backbone(model: TimmModel, global_pool: Optional[str], reset_other: bool) -> None:
    """timm's own ``reset_classifier(0)``; afterwards ``head_hidden_size`` is the width of the embedding."""
    head = getattr(model, HEAD_NAME, None)
    if head is not None and not model.unpooled and model.head_hidden_size == head.hidden_size:
        model.head_hidden_size = head.in_features
    backbone_cls = getattr(model, 'backbone_cls', type(model))
    kwargs: Dict[str, Any] = {'global_pool': global_pool} if global_pool is not None else {}
    if reset_other and 'reset_other' in inspect.signature(backbone_cls.reset_classifier).parameters:
        kwargs['reset_other'] = True
    backbone_cls.reset_classifier(model, 0, **kwargs)
    if global_pool is not None:
        model.unpooled = not global_pool


@functools.cache
def headed_cls(backbone_cls: Any) -> Any:
    """The subclass of a timm class that has an attached head."""
    forward_head: types.FunctionType = backbone_cls.forward_head
    # under another name, by which TorchScript compiles it beside the one that overrides it
    pooled = types.FunctionType(
        forward_head.__code__, forward_head.__globals__, 'pooled', forward_head.__defaults__, forward_head.__closure__)
    pooled.__kwdefaults__, pooled.__annotations__ = forward_head.__kwdefaults__, forward_head.__annotations__
    pooled.__dict__.update(forward_head.__dict__)
    attributes = dict(
        __doc__=f'{backbone_cls.__name__} with an attached head.',
        __module__=__name__,
        backbone_cls=backbone_cls,
        pooled=pooled,
    )
    mixin: Type[HeadedModel] = HeadedModel
    if len(inspect.signature(backbone_cls.forward_head).parameters) > len(('self', 'x', 'pre_logits')):
        mixin = HeadedMaskedModel
    elif hasattr(backbone_cls, 'set_distilled_training'):
        mixin = HeadedDistilledModel
    return type(f'{backbone_cls.__name__}WithHead', (mixin, backbone_cls), attributes)


def _new_headed_model(backbone_cls: Any) -> nn.Module:
    cls = headed_cls(backbone_cls)
    return cls.__new__(cls)
