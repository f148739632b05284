"""The controls: what every head is compared with."""

from torch import nn

from .classifier_head import ClassifierHead, check_positive, hidden_block


class LinearHead(ClassifierHead):
    """One linear, timm's own classifier: (N, F) -> (N, C); the pre-logits are the input.

    Args:
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C.
    """

    is_control = True


class MlpLayers(nn.Sequential):
    """Plain hidden layers: (N, F) -> (N, W), each as :func:`hidden_block`.

    Args:
        in_features: Input width F.
        layers: Number of hidden layers.
        width: Layer width W.
        dropout: Dropout rate in front of each linear, in a head of the last one too.
        norm_layer: timm name of a norm behind each linear, '' for none.
        act_layer: timm name of the activation.
    """

    def __init__(
            self,
            in_features: int,
            layers: int = 1,
            width: int = 512,
            dropout: float = 0.5,
            norm_layer: str = 'batchnorm1d',
            act_layer: str = 'relu',
            device=None,
            dtype=None,
    ):
        check_positive(in_features=in_features, layers=layers, width=width)
        super().__init__(*[
            hidden_block(width if i else in_features, width, dropout, norm_layer, act_layer, device, dtype)
            for i in range(layers)
        ])
        self.in_features = in_features
        self.out_features = width
        self.dropout = dropout


class MlpHead(ClassifierHead):
    """Multi-layer perceptron: (N, F) -> (N, C); the pre-logits are the last hidden layer.

    The control for the other heads: :func:`equal_size_mlp_width` gives the width with which it has as many parameters.
    The defaults are the plain VGG head of the SpinalNet paper (docs/papers/spinalnet.md, section 3.3).

    Args:
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C.
        **options: Those of :class:`MlpLayers`.
    """

    hidden_layers = MlpLayers
    is_control = True


def equal_size_mlp_width(num_params: int, in_features: int, num_classes: int, norm: bool = True) -> int:
    """Width of the one-layer :class:`MlpHead` whose parameter count is nearest to ``num_params``, at least 1.

    Args:
        num_params: Parameters of the head to match.
        in_features: Width F of the pooled vector.
        num_classes: Number of classes C.
        norm: Whether the MLP has a norm with weight and bias behind its hidden linear.
    """
    per_unit = in_features + 1 + num_classes + (2 if norm else 0)
    return max(1, round((num_params - num_classes) / per_unit))
