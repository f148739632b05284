"""The base class of the papers' small nets: timm's model contract over stages and a head."""

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import get_device_dtype
from timm.models import checkpoint
from torch import nn

from ..layers import HEADS, ClassifierHead, create_head, head_needs_feature_map
from ._feature_map import check_map_pool
from ._small_heads import GridPool, PlainHead
from ._timm import feature_take_indices
from .load_weights import build_model

MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
CIFAR_MEAN, CIFAR_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
SPINAL_PAPER = dict(paper_ids='arXiv:2007.03347', origin_url='https://github.com/dipuk0506/SpinalNet')
PROGRESSIVE_PAPER = dict(
    paper_ids='arXiv:2103.11373', origin_url='https://github.com/praveenchopra/ProgressiveSpinalNet')


def strip_head_prefix(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Model options ``head_*`` as options of the head.

    Raises:
        TypeError: If an option has no such prefix, as timm demands of an unknown model option.
    """
    for name in kwargs:
        if not name.startswith('head_'):
            raise TypeError(f"Unexpected model option '{name}'; options of the head are spelled head_<option>.")
    return {name[len('head_'):]: value for name, value in kwargs.items()}


class SmallNet(nn.Module):
    """Stages one after the other, pooling, head: (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        stages: The stages in order; the output of each is one level of features.
        channels: Output channels of each stage.
        reductions: Output stride of each stage.
        head: A name in ``timm_spinal.HEADS`` or in ``heads``. A capsule head averages the map by itself.
        head_options: Options of the head, without prefix.
        num_classes: Number of classes, 0 for none: the model then answers with the head's hidden layer.
        in_chans: Input channels.
        global_pool: timm's pooling type; with '' the model answers with its feature map.
        drop_rate: Dropout rate on the pooled vector.
        num_features: Channels of the feature map, where :meth:`join` makes it something else than the last output.
        grid: Positions per side that pooling keeps for the head.
        position_major: Whether the head gets its input position by position.
    """

    heads: Dict[str, Callable[..., ClassifierHead]] = {'plain': PlainHead}

    def __init__(
            self,
            stages: Sequence[nn.Module],
            channels: Sequence[int],
            reductions: Sequence[int],
            head: str,
            head_options: Dict[str, Any],
            num_classes: int = 10,
            in_chans: int = 1,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            num_features: Optional[int] = None,
            grid: int = 1,
            position_major: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stages = nn.Sequential(*stages)
        self.feature_info: List[Dict[str, Any]] = [
            dict(num_chs=chs, reduction=reduction, module=f'stages.{i}')
            for i, (chs, reduction) in enumerate(zip(channels, reductions))
        ]
        self.num_stages = len(self.feature_info)
        self.num_features = num_features or channels[-1]

        self.grid = grid
        self.position_major = position_major
        self.global_pool = GridPool(global_pool, grid, position_major)
        self.pool_drop = nn.Dropout(drop_rate)
        create = self.heads.get(head, partial(create_head, head))
        self.needs_feature_map = head in HEADS and head_needs_feature_map(head, **head_options)
        if self.needs_feature_map:
            check_map_pool(global_pool)
        self.head = create(
            self._head_in_features(),
            num_classes,
            device=device,
            dtype=dtype,
            **head_options,
        )
        self._update_head_hidden_size()

    def _head_in_features(self) -> int:
        return self.num_features * (1 if self.needs_feature_map else self.global_pool.features_per_channel)

    def _update_head_hidden_size(self) -> None:
        self.head_hidden_size = self.head.hidden_size if self.global_pool.pool_type else self.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        """The last linear, or its name."""
        return 'head.fc' if name_only else self.head.fc

    @torch.jit.ignore
    def reset_classifier(
            self,
            num_classes: int,
            global_pool: Optional[str] = None,
            reset_other: bool = False,
    ) -> None:
        """Replace the last linear.

        Args:
            num_classes: Number of classes, 0 for none: the model then answers with the head's hidden layer.
            global_pool: Pooling type, the current one is kept if None. With '' the model answers with its feature map.
            reset_other: Drop the hidden layers and the grid too: a linear classifier on the globally pooled map.
        """
        dd = get_device_dtype(self)
        if reset_other:
            self.grid, self.position_major = 1, False
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        if self.needs_feature_map:
            check_map_pool(global_pool)
        self.head.check_classes(num_classes, reset_other)
        self.global_pool = GridPool(global_pool, self.grid, self.position_major).train(self.training)
        in_features: Optional[int] = self._head_in_features()
        if not global_pool and not reset_other:
            in_features = None  # nothing is pooled, the hidden layers wait for the next reset
        self.head.reset(num_classes, reset_other=reset_other, in_features=in_features, **dd)
        self.num_classes = num_classes
        self._update_head_hidden_size()

    def forward_stages(self, x: torch.Tensor, last: int) -> List[torch.Tensor]:
        """Outputs of stages 0 .. last."""
        outputs: List[torch.Tensor] = []
        for i, stage in enumerate(self.stages):
            if i <= last:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(stage, x)
                else:
                    x = stage(x)
                outputs.append(x)
        return outputs

    def join(self, x: torch.Tensor, outputs: List[torch.Tensor]) -> torch.Tensor:
        """The feature map, from the input and the outputs of all stages."""
        return outputs[-1]

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Feature map and outputs of stages.

        Args:
            x: Input images.
            indices: Take the last n stages if int, all if None, these if a sequence.
            norm: No effect, there is no final norm.
            stop_early: Stop behind the last stage that is taken.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the stage outputs only.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        outputs = self.forward_stages(x, max_index if stop_early else self.num_stages - 1)
        intermediates = [output for i, output in enumerate(outputs) if i in take_indices]
        if intermediates_only:
            return intermediates
        if len(outputs) == self.num_stages:
            return self.join(x, outputs), intermediates
        return outputs[-1], intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop what the given stage outputs do not need.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Drop what follows the last stage.
            prune_head: Drop the head, even if all stages stay.
        """
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        prune_end = max_index < self.num_stages - 1
        if prune_end:
            self._prune_stages(max_index)
            self.num_stages = max_index + 1
        if prune_end or prune_norm:
            self._drop_join()
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '', reset_other=True)
        return take_indices

    def _prune_stages(self, last: int) -> None:
        self.stages = self.stages[:last + 1]

    def _drop_join(self) -> None:
        pass

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x, self.forward_stages(x, self.num_stages - 1))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if not self.global_pool.pool_type:
            return x
        if not self.needs_feature_map:
            x = self.global_pool(x)
        return self.head(self.pool_drop(x), pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def small_net_cfg(pool_size: Tuple[int, int], **kwargs: Any) -> Dict[str, Any]:
    """Pretrained config of a 28-pixel one-channel net with MNIST's mean and std, unless said otherwise."""
    cfg: Dict[str, Any] = dict(
        num_classes=10, input_size=(1, 28, 28), pool_size=pool_size, crop_pct=1.0, interpolation='bilinear',
        mean=MNIST_MEAN, std=MNIST_STD, first_conv='stages.0.0', classifier='head.fc',
    )
    return dict(cfg, **kwargs)


def build_small_net(
        net_cls: Callable[..., SmallNet],
        variant: str,
        pretrained: bool,
        num_stages: int,
        **kwargs: Any,
) -> Any:
    """`build_model` for a net with this many feature levels."""
    feature_cfg = dict(out_indices=tuple(range(num_stages)), flatten_sequential=True)
    return build_model(net_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
