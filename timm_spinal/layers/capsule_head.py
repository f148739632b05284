"""Capsule heads: CapsFC, XnODR and XnIDR.

Paper: "XnODR and XnIDR: Two Accurate and Fast Fully Connected Layers for Convolutional Neural Networks", Sun et al.,
https://arxiv.org/abs/2111.10854 (docs/papers/xnodr_xnidr.md, sections 2 to 4).
"""

from functools import partial
from typing import Optional, Tuple

import torch
from torch import nn

from .capsule import length
from .capsule_routing import CapsuleRouting, check_routed_classes
from .classifier_head import ClassifierHead
from .packed_routing import PackedRouting, check_packed_state, pack_routing
from .primary_capsules import BN_EPS, BN_MOMENTUM, TOKENS, VECTOR, PrimaryCapsules

PAPER_CLASSES = 10

torch.fx.wrap('length')  # it branches on the type of its input


class CapsuleScores(nn.Module):
    """Class capsules (B, J, D) -> scores (B, J): BN over D, ReLU, length.

    Lengths are not negative and not bounded above. ``scale`` and ``shift``, two learned numbers that start at 1 and 0,
    make logits of them.

    At the start v shrinks as J^-3 with the classes: the coupling is 1 / J, Glorot's W goes as J^-1/2, and squash
    squares. With the paper's epsilon, 1e-3, which is made for ten classes, BN then passes nothing on and the head does
    not learn. So above ten the epsilon shrinks as the variance of v does, by (10 / J)^6 (ours; unchanged up to ten).

    Args:
        dim: Capsule dimension D.
        num_classes: Number of classes J.
        logit_scale: Learn scale and shift.
        momentum: BN momentum.
        eps: BN epsilon at ten classes.
    """

    def __init__(
            self,
            dim: int,
            num_classes: int,
            logit_scale: bool,
            momentum: float,
            eps: float,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.logit_scale = logit_scale
        self.scale = nn.Parameter(torch.ones(1, **dd)) if logit_scale else None
        self.shift = nn.Parameter(torch.zeros(1, **dd)) if logit_scale else None
        eps *= min(1., PAPER_CLASSES / num_classes) ** 6
        self.norm = nn.BatchNorm1d(dim, eps, momentum, **dd)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        classes = v.shape[1]
        lengths = length(self.norm(v.flatten(0, 1)).relu().unflatten(0, (-1, classes)))
        if self.scale is not None and self.shift is not None:
            lengths = lengths * self.scale + self.shift
        return lengths


class CapsuleHead(ClassifierHead):
    """CapsFC: feature map (B, C, H, W) -> primary capsules -> routing -> lengths of the class capsules (B, J).

    Of tokens (B, T, C) each becomes a capsule by a linear, which is ours: the papers have maps only. T is then fixed.

    The pre-logits are the primary capsules, flat: (B, N d). The scores are plain lengths by default, as in the paper:
    its losses (``margin``, ``squared_hinge``) are defined on them. Lengths are not logits, being >= 0; for
    cross-entropy, mixup and distillation ``logit_scale=True`` adds a learned scale and shift.

    Args:
        in_features: Channels C.
        num_classes: Number of classes J, 0 for none, else at least 2.
        primary: Block in front of the capsules: 'depthwise' (MobileNetV2), 'bottleneck' (ResNet), 'vector': the head
            reads a pooled vector (B, C), which is cut into capsules as it is, or 'tokens'.
        capsules: Number N of primary capsules; 0 for 128 with 'depthwise' and C / d with the others. With 'tokens'
            the number of tokens, which `attach_head` finds out.
        capsule_dim: Their dimension d.
        class_dim: Dimension D of the class capsules.
        iterations: Routing iterations r.
        dropout: Dropout rate behind the routing.
        pool_first: Order of pooling in the primary block; False for the authors' order, which costs more.
        logit_scale: Learn a scale and a shift of the lengths.
        norm_momentum: Momentum of the head's BNs. The authors' 0.01 needs some hundred steps before an evaluation.
        norm_eps: Epsilon of the head's BNs; that of the class capsules is smaller above ten classes.
        memory: 'auto', 'whole' or 'lean', see :class:`CapsuleRouting`.
        packed: Make the capsule layer of XnODR or XnIDR a :class:`PackedRouting`, to load packed weights into.
        input_fmt: 'NCHW' or 'NHWC', the format of the map, or 'NLC' for tokens.
        num_prefix_tokens: Class and register tokens in front of the others, which are left out.

    Raises:
        ValueError: A value out of range, capsules that do not divide the channels, or a block for another input.
    """

    hidden_layers = PrimaryCapsules
    needs_feature_map = True
    reads_tokens = True
    averages_map = True
    per_class_modules = ('scores', 'fc')
    paper = '1710.09829'
    xnor_projector = False
    xnor_agreement = False

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            primary: str = 'depthwise',
            capsules: int = 0,
            capsule_dim: int = 8,
            class_dim: int = 16,
            iterations: int = 3,
            dropout: float = 0.,
            pool_first: bool = True,
            logit_scale: bool = False,
            norm_momentum: float = BN_MOMENTUM,
            norm_eps: float = BN_EPS,
            memory: str = 'auto',
            packed: bool = False,
            input_fmt: str = 'NCHW',
            num_prefix_tokens: int = 0,
            device=None,
            dtype=None,
    ):
        if (primary == TOKENS) != (input_fmt == 'NLC') and primary != VECTOR:
            raise ValueError(f"primary='{primary}' does not read {input_fmt}; 'tokens' is for tokens, "
                             "the other blocks are for maps.")
        # what _create_fc reads, which the base class calls
        self.needs_feature_map = primary != VECTOR
        self.channels_last = input_fmt == 'NHWC'
        self.map_dims = [1] if input_fmt == 'NLC' else [2, 3]
        self.num_prefix_tokens = num_prefix_tokens if input_fmt == 'NLC' else 0
        self.plain = False
        self.packed = packed
        self.capsule_dim = capsule_dim
        self._create_scores = partial(
            CapsuleScores, class_dim, logit_scale=logit_scale, momentum=norm_momentum, eps=norm_eps)
        self._create_routing = partial(
            CapsuleRouting,
            in_dim=capsule_dim,
            class_dim=class_dim,
            iterations=iterations,
            xnor_projector=self.xnor_projector,
            xnor_agreement=self.xnor_agreement,
            memory=memory,
        )
        super().__init__(
            in_features,
            num_classes,
            device=device,
            dtype=dtype,
            block=primary,
            capsules=capsules,
            dim=capsule_dim,
            pool_first=pool_first,
            momentum=norm_momentum,
            eps=norm_eps,
        )
        self.drop = nn.Dropout(dropout)
        self.averages = False

    def _create_fc(self, device=None, dtype=None) -> nn.Module:
        dd = {'device': device, 'dtype': dtype}
        has_capsules = self.num_classes > 0 and not self.plain
        # registered before fc, since timm's AGC takes the last parameters for the classifier
        scores: nn.Module = nn.Identity()
        if has_capsules:
            scores = self._create_scores(num_classes=self.num_classes, **dd)
        self.scores = scores
        if not has_capsules:
            return super()._create_fc(**dd)
        routing = self._create_routing(self.hidden_size // self.capsule_dim, num_classes=self.num_classes, **dd)
        return pack_routing(routing) if self.packed else routing

    @torch.jit.ignore
    def pack(self) -> None:
        """Turn the trained capsule layer into its form for inference, :class:`PackedRouting`.

        Raises:
            ValueError: CapsFC, a head without capsule layer, or one that is packed.
        """
        if not isinstance(self.fc, CapsuleRouting):
            reason = 'is packed already' if self.packed else 'has no capsule layer'
            raise ValueError(f"The head {reason}; give a trained float 'xnodr' or 'xnidr' head to pack.")
        self.fc = pack_routing(self.fc)
        self.packed = True

    @torch.jit.ignore
    def unpack(self) -> None:
        """The inverse of :meth:`pack`: a float layer that gives the same scores, and gradients for its input.

        Its weights are those that the packed form has kept: signs and scales of XnODR, all of XnIDR.
        """
        if isinstance(self.fc, PackedRouting):
            weight = self.fc.float_weight()
            routing = self._create_routing(
                self.fc.in_capsules, num_classes=self.num_classes, device=weight.device, dtype=weight.dtype)
            routing.load_state_dict(dict(weight=weight))
            self.fc = routing.train(self.training)
            self.packed = False

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if isinstance(self.fc, (CapsuleRouting, PackedRouting)):
            check_packed_state(state_dict, f'{prefix}fc.', self.packed, self.num_classes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def check_classes(self, num_classes: int, reset_other: bool = False) -> None:
        """Refuse a number of classes that :meth:`reset` with the same arguments could not take.

        Raises:
            ValueError: If it is negative, or 1, or another one for a packed head, which could not learn it.
        """
        super().check_classes(num_classes, reset_other)
        made = hasattr(self, 'fc')
        if made and self.packed and not (self.plain or reset_other) and num_classes not in (0, self.num_classes):
            raise ValueError(
                f'A packed head is for inference and cannot be reset to {num_classes} classes; create the model '
                'without head_packed, train it and pack it afterwards.')
        if num_classes == 1 and not (self.plain or reset_other):
            check_routed_classes(num_classes)

    @property
    def accepted_fmts(self) -> Tuple[str, ...]:
        if not self.needs_feature_map:
            return ()
        return ('NHWC',) if self.channels_last else ('NCHW',)

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
        """Replace the routing weights and the norm behind them; the primary capsules stay, unless the width changes.

        Args:
            num_classes: Number of classes, 0 for none.
            reset_other: Drop the capsules too, leaving a linear classifier on the averaged map.
            in_features: New channels. If they differ, the primary block is created again.
            pool_type: Has no effect: the head pools by itself, or reads a vector that is pooled already.
        """
        self.check_classes(num_classes, reset_other)
        self.plain = self.plain or reset_other
        super().reset(num_classes, reset_other, in_features, device, dtype)
        self.averages = isinstance(self.hidden, nn.Identity)

    @torch.jit.ignore
    def postpone_hidden(self) -> None:
        """Take the capsules out, until a reset to one class or more makes them anew; the map is averaged."""
        super().postpone_hidden()
        self.averages = True

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.needs_feature_map:
            if self.channels_last:
                x = x.permute(0, 3, 1, 2)
            if self.num_prefix_tokens > 0:
                x = x[:, self.num_prefix_tokens:]
            if self.averages:
                x = x.mean(self.map_dims)
        x = self.hidden(x)
        if pre_logits or self.num_classes == 0:
            return x
        if self.plain:
            return self.fc(x)
        v = self.fc(x.unflatten(1, (-1, self.capsule_dim)))
        return self.scores(self.drop(v))


class XnodrHead(CapsuleHead):
    """XnODR, binary projector outside dynamic routing: u_hat = (sgn x)(sgn W) K_x alpha_W; else as CapsuleHead."""

    xnor_projector = True
    paper = '2111.10854'


class XnidrHead(CapsuleHead):
    """XnIDR, binary agreement inside dynamic routing: l += <sgn u_hat, sgn v> K_u K_v; else as CapsuleHead."""

    xnor_agreement = True
    paper = '2111.10854'
