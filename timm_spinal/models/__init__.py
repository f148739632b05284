"""timm entrypoints, one file per family. Importing this package registers them."""

from typing import Iterable, List, Union

import timm

from . import (
    capsule_net,
    cifar100_resnet,
    cifar_resnet,
    head_variants,
    ic_variants,
    shared_basis_cifar,
    shared_basis_mobilenet,
    shared_basis_resnet,
    spinal_cifar,
    spinal_cnn,
    spinal_mlp,
    spinal_vgg5,
)
from ._ensure_registered import ensure_registered as ensure_registered
from ._packaged import packaged_names
from .attach_head import attach_head as attach_head
from .convert_ic import convert_to_ic as convert_to_ic
from .fold_batchnorm import fold_batchnorm as fold_batchnorm
from .head_variants import register_head_variant as register_head_variant
from .ic_active_share import ic_active_share as ic_active_share
from .ic_variants import register_ic_variant as register_ic_variant
from .ic_warm_start import ic_warm_start as ic_warm_start
from .merge_bases import fold_bases as fold_bases
from .merge_bases import merge_bases as merge_bases
from .pack import pack_xnodr as pack_xnodr
from .recalibrate_bn import recalibrate_bn as recalibrate_bn

# timm's registry knows a model by the last part of the module that defines it
_MODULES = [
    module.__name__.rpartition('.')[2]
    for module in (
        capsule_net, cifar100_resnet, cifar_resnet, head_variants, ic_variants, shared_basis_cifar,
        shared_basis_mobilenet, shared_basis_resnet, spinal_cifar, spinal_cnn, spinal_mlp, spinal_vgg5,
    )
]

for _name in packaged_names():
    ensure_registered(_name)


def list_models(
        filter: Union[str, Iterable[str]] = '',
        pretrained: bool = False,
        exclude_filters: Union[str, Iterable[str]] = '',
) -> List[str]:
    """Names of the models that this package registers, sorted as timm sorts.

    Args:
        filter: Wildcard or wildcards as in ``timm.list_models``.
        pretrained: Only names with weights, with their tags.
        exclude_filters: Wildcards to leave out.
    """
    return timm.list_models(filter, module=_MODULES, pretrained=pretrained, exclude_filters=exclude_filters)
