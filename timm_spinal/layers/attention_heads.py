"""Attention heads: classifiers that weigh the positions of a map, or the tokens, by learned queries.

Papers: "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", Psomas et al.,
https://arxiv.org/abs/2506.10178, and "ML-Decoder: Scalable and Versatile Classification Head", Ridnik et al.,
https://arxiv.org/abs/2111.12933 (docs/papers/attention_heads.md).
"""

from typing import Final, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .classifier_head import ClassifierHead, check_positive

PREFIX = ('drop', 'keep')
INPUT_FORMATS = ('NCHW', 'NHWC', 'NLC')


class TokenHead(ClassifierHead):
    """A head that reads all tokens: map (B, C, H, W) or (B, H, W, C), or tokens (B, T, C) -> logits (B, K).

    The positions of a map are its tokens. Without its hidden layers (``reset_other``) it is a linear classifier of the
    averaged tokens.

    Args:
        in_features: Channels C.
        num_classes: Number of classes K, 0 for none.
        input_fmt: 'NCHW' or 'NHWC' for a map, 'NLC' for tokens.
        num_prefix_tokens: Class and register tokens in front of the others.
        prefix: 'drop' takes the prefix tokens away, 'keep' reads them as the others.
        **options: Options of the hidden layers.

    Raises:
        ValueError: An unknown format or ``prefix``.
    """

    needs_feature_map = True
    reads_tokens = True
    is_control = True
    plain: Final[bool]  # TorchScript compiles only the branch that is taken

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            input_fmt: str = 'NCHW',
            num_prefix_tokens: int = 0,
            prefix: str = 'drop',
            device=None,
            dtype=None,
            **options,
    ):
        if input_fmt not in INPUT_FORMATS:
            raise ValueError(f"Unknown input_fmt '{input_fmt}'; use {', '.join(INPUT_FORMATS)}.")
        if prefix not in PREFIX:
            raise ValueError(f"Unknown prefix '{prefix}'; use {', '.join(PREFIX)}.")
        super().__init__(in_features, num_classes, device=device, dtype=dtype, **options)
        self.plain = False
        self.input_fmt = input_fmt
        self.num_prefix_tokens = num_prefix_tokens
        self.prefix = prefix

    @property
    def accepted_fmts(self) -> Tuple[str, ...]:
        return (self.input_fmt,)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The map or the tokens of a backbone as (B, T, C)."""
        if self.input_fmt == 'NCHW':
            return x.flatten(2).transpose(1, 2)
        if self.input_fmt == 'NHWC':
            return x.flatten(1, 2)
        return x[:, self.num_prefix_tokens:] if self.prefix == 'drop' else x

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
        """Replace the classifier; queries and projections stay, unless the width changes.

        Args:
            num_classes: Number of classes, 0 for none.
            reset_other: Drop the attention too, leaving a linear classifier of the averaged tokens.
            in_features: New channels. The hidden layers are made anew where they differ.
            pool_type: Has no effect: the head pools by itself, or reads a vector that is pooled already. Libraries that
                take any module with ``reset(num_classes, pool_type)`` for a head give it.
        """
        super().reset(num_classes, reset_other, in_features, device, dtype)
        self.plain = isinstance(self.hidden, nn.Identity)  # type: ignore[misc]

    @torch.jit.ignore
    def postpone_hidden(self) -> None:
        """Take the attention out, until a reset to one class or more makes it anew; the tokens are averaged."""
        super().postpone_hidden()
        self.plain = True  # type: ignore[misc]

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.tokens(x)
        x = x.mean(1) if self.plain else self.hidden(x)
        if pre_logits:
            return x
        return self.fc(self.drop(x))


class EfficientProbing(nn.Module):
    """Efficient probing: tokens X (B, T, C) -> z (B, C / r), with M queries and w = C / (r M)::

        A = softmax over T of C^-1/2 Q X^T          (M, T)
        z_m = A_m X Wv_m^T                          Wv_m: rows m w .. (m + 1) w of Wv
        z = norm([z_1, ..., z_M])                   batch norm without scale and shift

    The keys are the tokens themselves. Query m pools only the m-th of M slices of the values X Wv^T; pooling comes in
    front of the projection here, which gives the same for less (docs/papers/attention_heads.md, section 1).

    Args:
        in_features: Channels C.
        queries: Number of queries M. Where it does not divide C / r, the largest divisor below it is taken.
        reduction: The values have C / r channels.
        value_bias: Whether the projection Wv has a bias.
        norm: 'batchnorm' as in the paper, which needs two images or more in training; '' for none.

    Raises:
        ValueError: A size that is not positive, C that r does not divide, or an unknown norm.
    """

    def __init__(
            self,
            in_features: int,
            queries: int = 32,
            reduction: int = 1,
            value_bias: bool = False,
            norm: str = 'batchnorm',
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_positive(in_features=in_features, queries=queries, reduction=reduction)
        if in_features % reduction:
            raise ValueError(f'reduction ({reduction}) must divide the {in_features} channels.')
        if norm not in ('batchnorm', ''):
            raise ValueError(f"Unknown norm '{norm}'; use 'batchnorm' or ''.")
        dd = {'device': device, 'dtype': dtype}
        self.out_features = in_features // reduction
        self.num_queries = max(m for m in range(1, min(queries, self.out_features) + 1) if self.out_features % m == 0)
        self.scale = in_features ** -0.5
        self.queries = nn.Parameter(0.02 * torch.randn(self.num_queries, in_features, **dd))
        self.value = nn.Linear(in_features, self.out_features, bias=value_bias, **dd)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.BatchNorm1d(self.out_features, eps=1e-6, affine=False, **dd)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Weights A (B, M, T) of the tokens x (B, T, C)."""
        queries = (self.queries * self.scale).to(x.dtype)
        return (queries @ x.transpose(1, 2)).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.attention(x).to(x.dtype) @ x                                    # (B, M, C)
        value = self.value.weight.unflatten(0, (self.num_queries, -1)).to(x.dtype)    # (M, w, C)
        z = torch.einsum('bmc,mwc->bmw', pooled, value).flatten(1)
        if self.value.bias is not None:
            z = z + self.value.bias.to(z.dtype)
        return self.norm(z)


class AttentionHead(TokenHead):
    """Efficient probing as a classifier; the pre-logits are the normalised z of width C / r.

    Parameters: C^2 / r + M C + (C / r) K + K (docs/papers/attention_heads.md, section 1).

    Args:
        in_features: Channels C.
        num_classes: Number of classes K, 0 for none.
        **options: Those of :class:`TokenHead` and of :class:`EfficientProbing`.
    """

    hidden_layers = EfficientProbing
    paper = '2506.10178'

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """The queries, which are learned tokens."""
        return {'hidden.queries'}


class ClassQueries(nn.Module):
    """Fixed random queries of ML-Decoder, (G, D); they are saved and not trained.

    Args:
        groups: Number of queries G.
        dim: Width D.
    """

    weight: torch.Tensor

    def __init__(self, groups: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.register_buffer('weight', torch.randn(groups, dim, device=device, dtype=dtype))

    def forward(self) -> torch.Tensor:
        return self.weight


class GroupClassifier(nn.Module):
    """One answer for each class from the queries of groups of classes: (B, G, D) -> (B, K).

    Class k belongs to query k // g, g = ceil(K / G): ``logit[i g + j] = t_i . U_i[:, j] + b``.

    Args:
        groups: Number of queries G.
        dim: Width D.
        num_classes: Number of classes K.
    """

    def __init__(self, groups: int, dim: int, num_classes: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.empty(groups, dim, -(-num_classes // groups), **dd))
        self.bias = nn.Parameter(torch.zeros(num_classes, **dd))
        nn.init.xavier_normal_(self.weight)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum('bgd,gdk->bgk', t, self.weight.to(t.dtype)).flatten(1)[:, :self.num_classes]
        return scores + self.bias.to(scores.dtype)


class MlDecoderLayers(nn.Module):
    """One decoder layer without self-attention: tokens X (B, T, C), queries q (G, D) -> t (B, G, D)::

        E = relu(We X + be)
        t = LN1(q + drop(q))
        t = LN2(t + drop(MHA(t, E, E)))
        t = LN3(t + drop(W2 drop(relu(W1 t + b1)) + b2))

    Args:
        in_features: Channels C.
        dim: Width D.
        mlp_dim: Width of the hidden layer behind the attention.
        num_heads: Attention heads, which divide D.
        groups: Number of queries G; with fewer classes, one for each class.
        dropout: Dropout rate.

    Raises:
        ValueError: A size that is not positive, a width that the heads do not divide, or a rate outside [0, 1).
    """

    def __init__(
            self,
            in_features: int,
            dim: int = 768,
            mlp_dim: int = 2048,
            num_heads: int = 8,
            groups: int = 100,
            dropout: float = 0.1,
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_positive(in_features=in_features, dim=dim, mlp_dim=mlp_dim, num_heads=num_heads, groups=groups)
        if dim % num_heads:
            raise ValueError(f'num_heads ({num_heads}) must divide dim ({dim}).')
        if not 0. <= dropout < 1.:
            raise ValueError(f'dropout must lie in [0, 1), got {dropout}.')
        dd = {'device': device, 'dtype': dtype}
        self.out_features = dim
        self.groups = groups
        self.num_heads = num_heads
        self.rate = dropout
        self.embed = nn.Linear(in_features, dim, **dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.fc1 = nn.Linear(dim, mlp_dim, **dd)
        self.fc2 = nn.Linear(mlp_dim, dim, **dd)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, **dd) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(x).relu()
        t = queries.to(embedded.dtype).expand(x.shape[0], -1, -1)
        t = self.norm1(t + self.drop(t))
        key, value = self.kv(embedded).chunk(2, dim=-1)
        q, k, v = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q(t), key, value)]
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.)
        t = self.norm2(t + self.drop(self.proj(attended.transpose(1, 2).flatten(2))))
        return self.norm3(t + self.drop(self.fc2(self.drop(self.fc1(t).relu()))))


class MlDecoderHead(TokenHead):
    """ML-Decoder: learned answers to fixed random queries, one for each group of classes.

    The pre-logits are the mean of t over the queries, of width D. Trainable parameters: C D + 4 D^2 + 2 D F + 12 D + F
    + G D g + K, with F = ``mlp_dim`` (docs/papers/attention_heads.md, section 2).

    Args:
        in_features: Channels C.
        num_classes: Number of classes K, 0 for none.
        **options: Those of :class:`TokenHead` and of :class:`MlDecoderLayers`.
    """

    hidden_layers = MlDecoderLayers
    per_class_modules = ('queries', 'fc')
    paper = '2111.12933'

    def _create_fc(self, device=None, dtype=None) -> nn.Module:
        dd = {'device': device, 'dtype': dtype}
        self.queries: nn.Module = nn.Identity()  # registered before fc
        if isinstance(self.hidden, nn.Identity):
            return super()._create_fc(**dd)
        layers: MlDecoderLayers = self.hidden  # type: ignore[assignment]
        groups = min(layers.groups, self.num_classes or layers.groups)
        self.queries = ClassQueries(groups, self.hidden_size, **dd)
        if not self.num_classes:
            return nn.Identity()
        return GroupClassifier(groups, self.hidden_size, self.num_classes, **dd)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.tokens(x)
        if self.plain:
            x = x.mean(1)
            return x if pre_logits else self.fc(x)
        t = self.hidden(x, self.queries())
        return t.mean(1) if pre_logits or self.num_classes == 0 else self.fc(t)
