"""Names that are registered when they are asked for."""

from timm.models import is_model, split_model_name_tag

from ..layers import HEADS
from .head_variants import register_head_variant
from .ic_variants import register_ic_variant


def ensure_registered(model_name: str) -> bool:
    """Register a `<timm model>_<head>`, `ic<timm model>` or `ic<timm model>_<head>` that is not yet registered.

    Args:
        model_name: A model name, with or without a tag.

    Returns:
        Whether timm knows the name now.
    """
    name = split_model_name_tag(model_name)[0]
    if is_model(name):
        return True
    backbone, _, head = name.rpartition('_')
    if head in HEADS and ensure_registered(backbone):
        register_head_variant(backbone, head)
    elif name.startswith('ic') and is_model(name[len('ic'):]):
        register_ic_variant(name[len('ic'):])
    return is_model(name)
