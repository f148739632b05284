"""The representatives stand for every family of timm among the backbones, every head, and every small net."""

from timm.models import model_entrypoint

import timm_spinal
from timm_spinal.models.head_variants import BACKBONES, VARIANTS

from .representatives import HEADED, representatives


def family(backbone: str) -> str:
    return model_entrypoint(backbone).__module__


def test_every_family_and_head_is_there():
    pairs = [name.rsplit('_', 1) for name in HEADED]
    assert {family(backbone) for backbone, _ in pairs} == {family(backbone) for backbone in BACKBONES}
    assert {head for _, head in pairs} == {head for _, head in VARIANTS}


def test_all_are_registered_and_all_small_nets_are_among_them():
    names = representatives()
    assert len(names) == len(set(names)) and set(names) <= set(timm_spinal.list_models())
    assert all(any(name.startswith(prefix) for name in names) for prefix in timm_spinal.CONVOLUTIONS)
    some = {'vgg5', 'vgg5_spinal', 'vgg5_pspinal', 'spinalcnn_a1', 'spinalcnn_a2', 'spinal_mlp', 'resnet18_cifar'}
    assert some <= set(names)
