"""Replace convolutions of a model that timm has built by those of a row of `CONVOLUTIONS`."""

import math
from typing import Any, Dict, List, Optional

import torch
from timm.layers import CondConv2d
from torch import nn

from ..layers import SharedStage, nearest
from ._feature_map import TimmModel, _meta_twin
from ._timm import update_model_args
from .attach_head import HEAD_NAME
from .convolutions import CONVOLUTIONS, Convolution

SCOPES = ('spatial', 'block', 'all')

# parts of timm's module names
STEMS = ('stem', 'conv1', 'conv_stem')  # children of a model; a deep stem has further convolutions behind its first
PROJECTIONS = ('downsample', 'shortcut', 'skip', 'project')
GATES = ('se', 'se_module', 'attn', 'attn_last')
HEADS = ('head', HEAD_NAME)  # children of a model


def convert(
        model: TimmModel,
        convolution: str,
        scope: Optional[str] = None,
        depthwise: Optional[bool] = None,
        **options: Any,
) -> nn.Module:
    """Replace the convolutions of a timm model by another kind, a row of `CONVOLUTIONS`, in place.

    Parameters keep their names and values; those that are added have ``<convolution>_`` in their names, so that weights
    of the plain model load with only these missing. Convolutions that act as a linear layer, on a map of one position
    (squeeze-excite, classifiers), stay, and so do attention gates and heads.

    Args:
        model: A CNN from ``timm.create_model``, with ``features_only`` too.
        convolution: A row, such as 'ic'.
        scope: 'spatial', kernels larger than 1x1 outside stem and shortcuts; 'block', kernels of all sizes there;
            'all', stem and shortcuts too. None for the row's default.
        depthwise: Also replace depthwise convolutions. None for the row's default.
        **options: The layer's, without prefix, such as ``mode='pair'`` for the layer's ``ic_mode``.

    Returns:
        The same model. Its architecture is now called ``<convolution><name>``;
        :func:`timm_spinal.ensure_registered` registers this name with timm.

    Raises:
        ValueError: If the convolution or a value is unknown, if the model has no convolution to replace, or if one of
            them cannot be replaced.
        TypeError: If the convolution has no such option.
    """
    row = CONVOLUTIONS[convolution]
    given = dict(options, **{k: v for k, v in (('scope', scope), ('depthwise', depthwise)) if v is not None})
    settings = dict(row.options)
    for name, value in given.items():
        if f'{row.prefix}_{name}' not in settings:
            known = [option[len(row.prefix) + 1:] for option in settings]
            raise TypeError(f"{row.label} convolutions have no option '{name}'; their options are {', '.join(known)}."
                            f'{nearest(name, known)}')
        settings[f'{row.prefix}_{name}'] = value
    changed = {name: value for name, value in settings.items() if value != row.options[name]}
    names = find_convs(model, row, settings.pop(f'{row.prefix}_scope'), settings.pop(f'{row.prefix}_depthwise'))
    new = {name: _new_conv(row, model.get_submodule(name), settings) for name in names}
    for name, conv in new.items():
        model.set_submodule(name, conv)
    _rename(model, row, changed)
    return model


def convert_to_ic(model: TimmModel, scope: str = 'spatial', depthwise: bool = False, **options: Any) -> nn.Module:
    """:func:`convert` to inter-layer collision, :class:`timm_spinal.layers.ICConv2d`.

    Which convolutions the paper replaces is not sourced (docs/papers/ic_networks.md, section 4): the scopes and the
    default are reconstructed. Since the outputs of converted layers grow, BatchNorm statistics of a trained model no
    longer fit (docs/papers/ic_networks.md, section 7): call :func:`timm_spinal.ic_warm_start` or
    :func:`timm_spinal.recalibrate_bn` next.

    Args:
        model: A CNN from ``timm.create_model``, with ``features_only`` too.
        scope: 'spatial', 'block' or 'all'.
        depthwise: Also replace depthwise convolutions. The mean of a window in one channel has few terms and little
            information, and costs 7 % more on mobilenetv2_100.
        **options: ``mode``, ``scale``, ``norm`` and ``init``: ``ic_mode``, ``ic_scale``, ``ic_norm`` and ``ic_init`` of
            ICConv2d.
    """
    return convert(model, 'ic', scope, depthwise, **options)


def find_convs(model: TimmModel, row: Convolution, scope: str, depthwise: bool) -> List[str]:
    """Names of the convolutions in a scope of :func:`convert`, which raises what this raises."""
    if scope not in SCOPES:
        raise ValueError(f'{row.prefix}_scope {scope!r} is unknown; it is one of {", ".join(map(repr, SCOPES))}.')
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg is None:
        raise ValueError(f'{type(model).__name__} is not a model of timm; pass what timm.create_model returns.')
    architecture = cfg['architecture']
    _check_plain(model, row, architecture)
    sizes = _output_sizes(model)
    first_conv = cfg.get('first_conv') or ()
    stems = [flat_name(name) for name in ([first_conv] if isinstance(first_conv, str) else first_conv)]
    names, left_out = [], 0
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
                f"{architecture}: {row.label} cannot replace '{name}', a {type(conv).__name__}, only nn.Conv2d itself; "
                'choose a model or a scope without it.')
        names.append(name)
    if not names:
        hint = f' but {left_out} depthwise ones; give {row.prefix}_depthwise=True' if left_out else ''
        raise ValueError(f"{architecture} has no convolution for {row.label} in the scope '{scope}'{hint}.")
    return names


def _check_plain(model: TimmModel, row: Convolution, architecture: str) -> None:
    """Refuse a model whose convolutions are not plain any more."""
    for module in model.modules():
        for other in CONVOLUTIONS.values():
            if isinstance(module, other.layer):
                raise ValueError(f'{architecture} has {other.label} convolutions already; convert a plain model.')
        if isinstance(module, SharedStage):
            raise ValueError(f'{architecture} shares its filters, and {row.label} cannot be combined with shared '
                             'bases; convert a plain model.')


def _in_scope(name: str, conv: Any, scope: str, stems: List[str]) -> bool:
    flat = flat_name(name)
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
    """A module's name, which is the same in a model and in its form for ``features_only``."""
    return name.removeprefix('model.').removeprefix('body.').replace('.', '_')


def _output_sizes(model: TimmModel) -> Dict[str, int]:
    """Number of positions of each convolution's output map, at the model's own input size."""
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


def _new_conv(row: Convolution, conv: Any, options: Dict[str, Any]) -> nn.Conv2d:
    """The row's layer in the place of a convolution, with the very parameters of that one."""
    new: Any = row.layer(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device='meta',  # without drawing weights, which would change the numbers drawn for what comes next
        dtype=conv.weight.dtype,
        **options,
    )
    added = [name for name in new.state_dict() if name not in ('weight', 'bias')]
    new = new.to_empty(device=conv.weight.device)
    new.weight, new.bias = conv.weight, conv.bias
    if added:
        new.reset_added_parameters()
    return new.train(conv.training)


def _rename(model: TimmModel, row: Convolution, options: Dict[str, Any]) -> None:
    """Name and arguments under which the model can be made again."""
    if hasattr(model, 'backbone_architecture'):
        model.backbone_architecture = f'{row.prefix}{model.backbone_architecture}'
    architecture = f'{row.prefix}{model.pretrained_cfg["architecture"]}'
    model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, architecture=architecture)
    update_model_args(model, **options)
