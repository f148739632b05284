"""timm entrypoints, one file per family. Importing this package registers them."""

from inspect import ismodule
from typing import Iterable, List, Union

import timm
from timm.models import is_model, split_model_name_tag

from ..layers import HEADS
from . import (  # noqa: F401
    capsule_net,
    cifar100_resnet,
    cifar_resnet,
    convolution_variants,
    head_variants,
    shared_basis_cifar,
    shared_basis_mobilenet,
    shared_basis_resnet,
    spinal_cifar,
    spinal_cnn,
    spinal_mlp,
    spinal_vgg5,
)
from ._packaged import packaged_names
from ._variants import TAG_PREFIX
from .attach_head import attach_head as attach_head
from .convert import convert as convert
from .convert import convert_to_ic as convert_to_ic
from .convolution_variants import register_convolution_variant as register_convolution_variant
from .convolution_variants import register_ic_variant as register_ic_variant
from .convolutions import CONVOLUTIONS as CONVOLUTIONS
from .convolutions import Convolution as Convolution
from .head_variants import register_head_variant as register_head_variant
from .ic_collisions import ic_active_share as ic_active_share
from .ic_collisions import ic_warm_start as ic_warm_start
from .inference import fold_batchnorm as fold_batchnorm
from .inference import pack_xnodr as pack_xnodr
from .merge_bases import fold_bases as fold_bases
from .merge_bases import merge_bases as merge_bases
from .recalibrate_bn import recalibrate_bn as recalibrate_bn

# timm's registry knows a model by the last part of the name of the module that registers it
_MODULES = [name for name, value in vars().copy().items() if ismodule(value) and hasattr(value, 'default_cfgs')]


def ensure_registered(model_name: str) -> bool:
    """Register a `<timm model>_<head>`, `<convolution><timm model>` or `<convolution><timm model>_<head>`.

    Args:
        model_name: A model name, with or without a tag. The heads are the rows of `HEADS`, the convolutions those of
            `CONVOLUTIONS`. A name that is registered stays.

    Returns:
        Whether timm knows the name now.
    """
    name = split_model_name_tag(model_name)[0]
    if is_model(name):
        return True
    backbone, _, head = name.rpartition('_')
    if head in HEADS and ensure_registered(backbone):
        register_head_variant(backbone, head)
        return True
    for prefix in CONVOLUTIONS:
        if name.startswith(prefix) and is_model(name[len(prefix):]):
            register_convolution_variant(name[len(prefix):], prefix)
            return True
    return False


for _name in packaged_names():
    ensure_registered(_name)


def list_models(
        filter: Union[str, Iterable[str]] = '',
        pretrained: Union[bool, str] = False,
        exclude_filters: Union[str, Iterable[str]] = '',
) -> List[str]:
    """Names of the models that this package registers, sorted as timm sorts.

    Args:
        filter: Wildcard or wildcards as in ``timm.list_models``.
        pretrained: True for names with weights only, with their tags; 'whole' for those of them whose weights fill
            the whole model, its head included. A tag that begins with 'backbone' fills the backbone alone.
        exclude_filters: Wildcards to leave out.

    Raises:
        ValueError: Another string for ``pretrained``.
    """
    if pretrained not in (True, False, 'whole'):
        raise ValueError(f"pretrained must be True, False or 'whole', got {pretrained!r}.")
    names = timm.list_models(filter, module=_MODULES, pretrained=bool(pretrained), exclude_filters=exclude_filters)
    if pretrained == 'whole':
        names = [name for name in names if not split_model_name_tag(name)[1].startswith(TAG_PREFIX)]
    return names
