"""Replace convolutions of a model that timm has built by inter-layer collision convolutions.

Which ones the paper replaces is not sourced (spec ic_networks_wld 2.7): the scopes and the default are reconstructed.
"""

import inspect
import math
from typing import Any, Dict, List

import torch
from timm.layers import CondConv2d
from torch import nn

from ..layers import ICConv2d, SharedStage, check_ic_options
from ._feature_map import TimmModel, _meta_twin
from .attach_head import HEAD_NAME

SCOPES = ('spatial', 'block', 'all')

# parts of timm's module names
STEMS = ('stem', 'conv1', 'conv_stem')  # of a model's children: what lies in a deep stem beside its first convolution
PROJECTIONS = ('downsample', 'shortcut', 'skip', 'project')
GATES = ('se', 'se_module', 'attn', 'attn_last')
HEADS = ('head', HEAD_NAME)  # of a model's children


def convert_to_ic(
        model: nn.Module,
        scope: str = 'spatial',
        depthwise: bool = False,
        mode: str = 'filter',
        scale: str = 'mean',
        norm: str = '',
        init: float = 1.,
) -> nn.Module:
    """Replace convolutions by :class:`timm_spinal.layers.ICConv2d`, in place.

    Parameters keep their names and values; those that are added have ``ic_`` in their names, so that weights of the
    plain model load with only these missing. What a linear layer would do, on a map of one position (squeeze-excite,
    classifiers), stays, and so do attention gates and heads.

    Since the outputs of converted layers grow, BatchNorm statistics of a trained model no longer fit (spec 4.4):
    :func:`timm_spinal.ic_warm_start` or :func:`timm_spinal.recalibrate_bn` comes next.

    Args:
        model: A CNN from ``timm.create_model``, with ``features_only`` too.
        scope: 'spatial', kernels larger than 1x1 outside stem and shortcuts; 'block', kernels of all sizes there;
            'all', stem and shortcuts too.
        depthwise: Also where each filter reads one channel: a window's mean over so few terms says little, at a cost
            of +7 % on mobilenetv2_100.
        mode, scale, norm, init: ``ic_mode``, ``ic_scale``, ``ic_norm`` and ``ic_init`` of ICConv2d.

    Returns:
        The same model. Its architecture's name is now ``ic<name>``, see :func:`timm_spinal.register_ic_variant`.

    Raises:
        ValueError: If an option is unknown, or nothing in the model is, or something is not, a convolution that IC can
            replace.
    """
    layer_options = dict(ic_mode=mode, ic_scale=scale, ic_norm=norm, ic_init=init)
    check_ic_options(**layer_options)  # type: ignore[arg-type]
    modules = dict(model.named_modules())
    for name in find_convs(model, scope, depthwise):
        parent, _, child = name.rpartition('.')
        setattr(modules[parent], child, _ic_conv(modules[name], layer_options))
    _rename(model, dict(ic_scope=scope, ic_depthwise=depthwise, **layer_options))
    return model


IC_OPTIONS: Dict[str, Any] = {
    f'ic_{name}': parameter.default
    for name, parameter in inspect.signature(convert_to_ic).parameters.items() if name != 'model'
}


def find_convs(model: TimmModel, scope: str, depthwise: bool) -> List[str]:
    """Names of the convolutions in a scope of :func:`convert_to_ic`, which raises what this raises."""
    if scope not in SCOPES:
        raise ValueError(f'ic_scope {scope!r} is unknown; it is one of {", ".join(map(repr, SCOPES))}.')
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg is None:
        raise ValueError(f'{type(model).__name__} is no model of timm; pass what timm.create_model returns.')
    architecture = cfg['architecture']
    for module in model.modules():
        if isinstance(module, ICConv2d):
            raise ValueError(f'{architecture} has IC convolutions already; convert a plain model.')
        if isinstance(module, SharedStage):
            raise ValueError(f'{architecture} shares its filters; IC and shared bases are not mixed.')
    sizes = _output_sizes(model)
    first_conv = cfg.get('first_conv') or ()
    stems = [flat_name(name) for name in ([first_conv] if isinstance(first_conv, str) else first_conv)]
    found, left_out = [], 0
    for name, conv in model.named_modules():
        if not isinstance(conv, (nn.Conv2d, CondConv2d)) or not _in_scope(name, conv, scope, stems):
            continue
        if sizes.get(name) == 1:
            continue
        if conv.in_channels == conv.groups > 1 and not depthwise:
            left_out += 1
            continue
        if type(conv) is not nn.Conv2d:
            raise ValueError(
                f"{architecture}: IC cannot replace '{name}', a {type(conv).__name__}, only nn.Conv2d itself; choose a "
                'model or a scope without it.')
        found.append(name)
    if not found:
        hint = f' but {left_out} depthwise ones; give ic_depthwise=True' if left_out else ''
        raise ValueError(f"{architecture} has no convolution for IC in the scope '{scope}'{hint}.")
    return found


def _in_scope(name: str, conv: Any, scope: str, stems: List[str]) -> bool:
    flat = flat_name(name)  # as long as features_only leaves a name
    parts = name.split('.')
    if parts[0] in HEADS or any(part in GATES for part in parts):
        return False
    if scope == 'all':
        return True
    is_stem = flat in stems or any(flat.startswith(f'{stem}_') for stem in STEMS)
    if is_stem or any(part in PROJECTIONS for part in parts):
        return False
    return scope == 'block' or math.prod(conv.kernel_size) > 1


def flat_name(name: str) -> str:
    """The same for a module in a model and in what ``features_only`` makes of it."""
    return name.removeprefix('model.').removeprefix('body.').replace('.', '_')


def _output_sizes(model: TimmModel) -> Dict[str, int]:
    """Positions in the map that each convolution gives, at the model's own input size."""
    sizes: Dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            sizes[name] = math.prod(output.shape[2:])
        return hook

    twin = _meta_twin(model)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    chans, height, width = model.pretrained_cfg['input_size']
    dtype = next(twin.parameters()).dtype
    with torch.no_grad():
        twin(torch.empty(1, getattr(model, 'in_chans', chans), height, width, device='meta', dtype=dtype))
    return sizes


def _ic_conv(conv: nn.Conv2d, options: Dict[str, Any]) -> ICConv2d:
    """The same convolution with a collision, with the very parameters of the old one."""
    new = ICConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device='meta',
        dtype=conv.weight.dtype,
        **options,
    ).to_empty(device=conv.weight.device)
    new.weight, new.bias = conv.weight, conv.bias
    new.reset_collision()
    return new.train(conv.training)


def _rename(model: TimmModel, options: Dict[str, Any]) -> None:
    """Name and arguments under which the model can be made again."""
    if hasattr(model, 'backbone_architecture'):
        model.backbone_architecture = f'ic{model.backbone_architecture}'
    model.pretrained_cfg = dict(model.pretrained_cfg, architecture=f'ic{model.pretrained_cfg["architecture"]}')
    model.default_cfg = model.pretrained_cfg
    changed = {name: value for name, value in options.items() if value != IC_OPTIONS[name]}
    model._model_args = dict(getattr(model, '_model_args', {}), **changed)
