"""What models with shared filter bases have in common: their shared tensors, and checkpoints of the paper's code."""

import re
from typing import Any, Dict, Set

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ..layers import SharedBasisConv2d, SharedStage, orthogonality_loss

SHARED_BASIS_PAPER = dict(paper_ids='arXiv:2006.05066', origin_url='https://github.com/ssregibility/Net_RL2')

# names of the paper's code (docs/papers/shared_bases.md, section 11) and ours; \1 is a stage or a block, \2 the number
# of a basis
_OFFICIAL_NAMES = (
    (r'^shared_basis_(\d)(?:_1)?\.weight$', r'layer\1.basis'),
    (r'^shared_basis_(\d)_2\.weight$', r'layer\1.basis2'),
    (r'^(.+)\.basis_conv(\d)\.weight$', r'\1.conv\2.unique'),
    (r'^(.+)\.basis_bn(\d)\.', r'\1.conv\2.basis_norm.'),
    (r'^(.+)\.coeff_conv(\d)\.weight$', r'\1.conv\2.coeff'),
    (r'^(.+)\.shortcut\.', r'\1.downsample.'),
)
_ALIAS = re.compile(r'^layer(\d)\.\d+\.shared_basis(_\d)?\.weight$')
_NORM = re.compile(r'^(.+)\.bn(\d)\.')


class SharedBasisModel:
    """Mixed into a timm class whose stages share filters, in front of it in the method resolution order.

    With ``sb_decay`` off, ``no_weight_decay`` names the shared tensors: weight decay pulls against the orthogonality
    penalty, and in the paper's form of it may win (docs/papers/shared_bases.md, section 4).
    """

    sb_decay: bool
    sb_ortho_unique = False  # whether the paper's penalty counts unique filters: on CIFAR-10

    @torch.jit.ignore
    def shared_stages(self) -> Dict[str, SharedStage]:
        """The stages that share filters, by name, in order."""
        assert isinstance(self, nn.Module)
        return {name: module for name, module in self.named_modules() if isinstance(module, SharedStage)}

    @torch.jit.ignore
    def orthogonality_loss(self, mode: str = 'official') -> torch.Tensor:
        """How far the shared filters are from orthonormal; see :func:`timm_spinal.layers.orthogonality_loss`."""
        return orthogonality_loss(self.shared_stages().values(), mode, with_unique=self.sb_ortho_unique)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the shared tensors if ``sb_decay`` is off, else none, as in the paper."""
        if self.sb_decay:
            return set()
        return {f'{name}.{basis}' for name, stage in self.shared_stages().items() for basis in stage.basis_names()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """timm's groups for layer decay, the bases of a stage with its first block that shares."""
        matcher = super().group_matcher(coarse)  # type: ignore[misc]
        if not coarse:
            blocks = matcher['blocks']
            rows = [(blocks, None)] if isinstance(blocks, str) else blocks
            matcher['blocks'] = [(r'^(?:layer|blocks\.|stages\.)(\d+)\.basis', (1,)), *rows]
        return matcher

    @torch.jit.ignore
    def init_shared(self) -> None:
        """Re-initialise the decomposed convolutions and the shared filters, as in the paper."""
        assert isinstance(self, nn.Module)
        for module in self.modules():
            if isinstance(module, (SharedStage, SharedBasisConv2d)):
                module.reset_parameters()


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, Any]:
    """Names of the paper's code to ours; a state dict of our own stays as it is.

    The paper's code registers each basis under the model and again under every block, and its ImageNet checkpoints
    carry the prefix of DataParallel.

    Raises:
        ValueError: If the copies of a basis differ.
    """
    state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    converted = {}
    for name, value in state_dict.items():
        if alias := _ALIAS.match(name):
            owner = f'shared_basis_{alias[1]}{alias[2] or ""}.weight'
            if owner not in state_dict or not torch.equal(state_dict[owner], value):
                raise ValueError(f"The checkpoint's '{name}' differs from its '{owner}'; a basis is one tensor.")
            continue
        norm = _NORM.match(name)
        if norm and f'{norm[1]}.coeff_conv{norm[2]}.weight' in state_dict:
            name = f'{norm[1]}.conv{norm[2]}.norm.{name[norm.end():]}'
        for pattern, replacement in _OFFICIAL_NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def shared_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Pretrained config of an ImageNet model without weights, with the paper's crop."""
    cfg: Dict[str, Any] = dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv='conv1', classifier='fc',
        **SHARED_BASIS_PAPER,
    )
    return dict(cfg, **kwargs)
