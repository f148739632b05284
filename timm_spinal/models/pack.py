"""Trained XnODR and XnIDR models in their form for inference."""

from timm.models._input import update_model_args
from torch import nn

from ..layers import CapsuleHead
from .attach_head import HEAD_NAME


def pack_xnodr(model: nn.Module) -> nn.Module:
    """Pack the capsule head of a trained model, in place: bits and scales for XnODR, an agreement of bits for XnIDR.

    Packing is for CPUs and for the size of files; on a GPU the float model is faster.

    Scores are those of the float model to 1e-5. The model cannot be trained any more. It is saved and loaded as any
    timm model; its ``config.json`` has the option ``head_packed``.

    Args:
        model: A model with an 'xnodr' or 'xnidr' head, attached or its own.

    Returns:
        The same model.

    Raises:
        ValueError: There is no such head, or it is packed already.
    """
    head = getattr(model, HEAD_NAME, None) or getattr(model, 'head', None)
    if not isinstance(head, CapsuleHead):
        raise ValueError(f"{type(model).__name__} has no capsule head; give a model with the head 'xnodr' or 'xnidr'.")
    head.pack()
    update_model_args(model, head_packed=True)
    return model
