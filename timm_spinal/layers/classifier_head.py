"""What every vector head shares: hidden layers, then one linear classifier."""

import inspect
from functools import partial
from typing import Any, Callable, Optional, Set, Tuple

import torch
from timm.layers import get_act_layer, get_device_dtype, get_norm_layer
from torch import nn

HiddenFactory = Callable[..., nn.Module]


def hidden_block(
        in_features: int,
        width: int,
        dropout: float = 0.,
        norm_layer: str = '',
        act_layer: str = 'relu',
        device=None,
        dtype=None,
) -> nn.Sequential:
    """One hidden layer of the papers' heads: (Dropout)? -> Linear -> (norm)? -> activation.

    See docs/papers/spinalnet.md, section 2.

    Args:
        in_features: Input width.
        width: Output width W.
        dropout: Dropout rate in front of the linear, in [0, 1); no dropout module at 0.
        norm_layer: timm name of a norm over (N, W), such as 'batchnorm1d' or 'layernorm'; '' for none.
        act_layer: timm name of an activation.

    Raises:
        ValueError: If the dropout rate is out of range or a layer name is unknown to timm.
    """
    dd = {'device': device, 'dtype': dtype}
    if not 0. <= dropout < 1.:
        raise ValueError(f'dropout must lie in [0, 1), got {dropout}.')
    try:
        norm = get_norm_layer(norm_layer)
    except KeyError:
        raise ValueError(
            f"Unknown norm_layer '{norm_layer}'; use 'batchnorm1d', 'layernorm', 'rmsnorm' or ''.") from None
    try:
        act = get_act_layer(act_layer)
    except KeyError:
        raise ValueError(f"Unknown act_layer '{act_layer}'; use a timm name such as 'relu' or 'gelu'.") from None

    block = nn.Sequential()
    if dropout > 0.:
        block.add_module('drop', nn.Dropout(dropout))
    block.add_module('fc', nn.Linear(in_features, width, **dd))
    if norm is not None:
        block.add_module('norm', norm(width, **dd))
    if act is not None:
        block.add_module('act', act())
    return block


def check_positive(**sizes: int) -> None:
    """Raise ValueError for the first size that is not a positive whole number."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a positive whole number, got {value!r}.')


class NoHiddenLayers(nn.Identity):
    """The hidden layers of a linear classifier: (N, F) -> (N, F).

    Args:
        in_features: Width F of the pooled vector.
    """

    def __init__(self, in_features: int, device=None, dtype=None):
        super().__init__()
        self.out_features = in_features


class ClassifierHead(nn.Module):
    """Pooled vector (N, F) -> hidden layers -> pre-logits (N, hidden_size) -> logits (N, C).

    With ``num_classes`` 0 the output is the pre-logits. The last linear is ``fc`` and is registered last, where timm's
    AGC expects the classifier. A subclass names the class of its hidden layers, whose options are then its own:
    ``inspect.signature`` of the subclass shows them.

    Args:
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C, 0 for none.
        **options: Options of the hidden layers.

    Attributes:
        hidden_layers: Makes the hidden layers from (in_features, device=, dtype=, **options). The module has
            ``out_features`` and, if needed, ``dropout``, the rate in front of the linear behind it.
        needs_feature_map: Whether the input is the feature map and not the pooled vector.
        reads_tokens: Whether a head that needs the feature map takes tokens (N, T, C) as well.
        averages_map: Whether it averages the map, so that the model can have no other pooling.
        is_control: Whether it is one that the papers' heads are measured against.
        per_class_modules: Submodules whose shape depends on the number of classes.
        paper: arXiv number of the paper, '' for none.
        accepted_fmts: Formats of a backbone's output that the head reads as it is: 'NCHW', 'NHWC' or 'NLC' (tokens);
            none where it reads the pooled vector.
        pre_logits_dim: The same as ``hidden_size``, by the name that other libraries have for it.
    """

    hidden_layers: Callable[..., nn.Module] = NoHiddenLayers
    needs_feature_map = False
    reads_tokens = False
    averages_map = False
    is_control = False
    per_class_modules: Tuple[str, ...] = ('fc',)
    paper = ''
    __jit_unused_properties__ = ('accepted_fmts', 'pre_logits_dim')

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            own = [parameter.name for parameter in parameters]
            parameters[-1:] = [
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for parameter in inspect.signature(cls.hidden_layers).parameters.values() if parameter.name not in own]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __init__(self, in_features: int, num_classes: int, device=None, dtype=None, **options: Any):
        super().__init__()
        check_positive(in_features=in_features)
        self.check_classes(num_classes)
        self.in_features = in_features
        self.num_classes = num_classes
        dd = {'device': device, 'dtype': dtype}
        self._create_hidden: Optional[HiddenFactory] = partial(type(self).hidden_layers, **options)
        self.hidden: nn.Module = self._create_hidden(in_features, **dd)
        self.hidden_size: int = self.hidden.out_features  # type: ignore[assignment]
        self.drop = nn.Dropout(getattr(self.hidden, 'dropout', 0.))
        self.fc = self._create_fc(**dd)

    def _create_fc(self, device=None, dtype=None) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        return nn.Linear(self.hidden_size, self.num_classes, device=device, dtype=dtype)

    @property
    def accepted_fmts(self) -> Tuple[str, ...]:
        return ()

    @property
    def pre_logits_dim(self) -> int:
        return self.hidden_size

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    @torch.jit.ignore
    def check_classes(self, num_classes: int, reset_other: bool = False) -> None:
        """Refuse a number of classes that :meth:`reset` with the same arguments could not take.

        Raises:
            ValueError: If it is negative.
        """
        if num_classes < 0:
            raise ValueError(f'num_classes must not be negative, got {num_classes}.')

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of matrices that have no weight decay, as timm's models name theirs."""
        return set()

    @torch.jit.ignore
    def postpone_hidden(self) -> None:
        """Take the hidden layers out, until a reset to one class or more creates them again."""
        self.hidden = nn.Identity()
        self.hidden_size = self.in_features

    @torch.jit.ignore
    def reset(
            self,
            num_classes: int,
            reset_other: bool = False,
            in_features: Optional[int] = None,
            device=None,
            dtype=None,
            pool_type: Optional[str] = None,
    ) -> None:
        """Replace the last linear; the hidden layers stay, unless the input width changes.

        Args:
            num_classes: Number of classes of the new linear, 0 for none.
            reset_other: Drop the hidden layers too, leaving a plain linear classifier.
            in_features: New input width. If it differs, the hidden layers are created again.
            pool_type: Has no effect: the head pools by itself, or reads a vector that is pooled already. Libraries that
                take any module with ``reset(num_classes, pool_type)`` for a head give it.
        """
        dd = get_device_dtype(self, device=device, dtype=dtype)
        if reset_other:
            self._create_hidden = None
            self.hidden = nn.Identity()
            self.drop = nn.Dropout(0.)
        absent = isinstance(self.hidden, nn.Identity)
        stale = in_features is not None and in_features != self.in_features
        if in_features is not None:
            self.in_features = in_features
        if self._create_hidden is not None and (num_classes > 0 if absent else stale):
            self.hidden = self._create_hidden(self.in_features, **dd)
        self.num_classes = num_classes
        self.hidden_size = getattr(self.hidden, 'out_features', self.in_features)
        self.fc = self._create_fc(**dd)
        self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.hidden(x)
        if pre_logits:
            return x
        return self.fc(self.drop(x))
