"""A timm model from a config, with one-line errors for what a user can get wrong."""
import difflib
import json
import re
from typing import Any, Mapping, Sequence

import timm
import torch
import torch.nn as nn
from timm.models import load_model_config_from_hf, parse_model_name, resolve_model_input_args, split_model_name_tag
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.module_tracker import ModuleTracker

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.files import wrong_type
from timm_spinal.models._timm import load_model_config_from_path
from timm_spinal.models.fill_weights import LoadedWeights, watch_load
from timm_spinal.models.hub_checksums import check_download
from timm_spinal.models.hub_errors import explain, one_line
from timm_spinal.models.load_weights import create_from_file, load_exactly
from timm_spinal.models.weight_files import MisfitError, WeightsError, first_names

from .config import TrainConfig, ValidateConfig
from .results import CONFIG_TYPES

FAST_MOMENTUM = 0.1  # of BatchNorm; PyTorch's default
WINDOWS = 20  # times that the running statistics of BatchNorm are renewed in a run, at least
_TRACKER = ModuleTracker()  # says whether a backward pass is running
_REGISTERED_ON_IMPORT = frozenset(timm_spinal.list_models())


def create_model(config: TrainConfig | ValidateConfig, num_classes: int | None) -> nn.Module:
    """The model that a config names, on the CPU, with its weights and settings.

    Args:
        config: The options of the group "Model".
        num_classes: Classes of the data; None keeps the model's own.

    Raises:
        UserError: Unknown model or model option, weights that are missing, unreachable or do not fit.
    """
    check_model_name(config.model)
    label, cache_dir = f'model {config.model}', config.model_kwargs.get('cache_dir')
    if config.pretrained_path and config.initial_checkpoint:
        raise UserError('--pretrained-path and --initial-checkpoint: the second replaces all weights of the first; '
                        'give one of them')
    options = dict(
        num_classes=num_classes,
        drop_rate=config.drop or None,
        drop_path_rate=config.drop_path,
        drop_block_rate=config.drop_block,
        global_pool=config.gp,
    )
    try:
        inputs = dict(img_size=config.img_size, input_size=config.input_size, in_chans=config.in_chans)
        resolved = resolve_model_input_args(config.model, args=inputs, **{**options, **config.model_kwargs})
        model = _create(config, resolved)
        _apply_settings(model, config)
    except Exception as e:
        if config.pretrained or config.pretrained_path:  # damaged weights may raise any error
            origin = dict(file=config.pretrained_path) if config.pretrained_path else config.model
            check_download(label, origin, cache_dir)
        if isinstance(e, WeightsError):
            raise UserError(f'{_file_flag(config)}{e}') from e
        if (reason := _reason(config.model, e)) is None:
            raise
        missing = isinstance(config, TrainConfig) and config.pretrained and explain(e)
        other_start = ', or start with --pretrained-path FILE or --no-pretrained' if missing else ''
        raise UserError(f'{label}: {reason}{other_start}') from e
    if config.pretrained or config.pretrained_path:
        cfg: Any = dict(file=config.pretrained_path) if config.pretrained_path else model.pretrained_cfg
        check_download(label, cfg, cache_dir)
    if isinstance(config, TrainConfig) and any(getattr(module, 'packed', False) for module in model.modules()):
        raise UserError(f'model {config.model}: its capsule head is packed and can only be used for inference; train '
                        'the float model and pack it afterwards')
    return model


def _create(config: TrainConfig | ValidateConfig, resolved: dict[str, Any]) -> Any:
    """The model with the weights that a config names; its ``loaded_weights`` say what became of them, if it has any."""
    if config.pretrained_path:
        return create_from_file(resolved.pop('model_name'), config.pretrained_path, **resolved)
    with watch_load(config.model) as loaded:
        model: Any = timm.create_model(**resolved, pretrained=config.pretrained)
    if (repo := model.pretrained_cfg.get('hf_hub_id')) and repo not in config.model:
        loaded.source += f' ({repo})'
    model.loaded_weights = loaded if config.pretrained else None
    if config.initial_checkpoint:
        try:
            model.loaded_weights = load_exactly(model, config.initial_checkpoint)
        except MisfitError as e:
            if isinstance(config, ValidateConfig):
                raise
            raise MisfitError(f'{e}; --pretrained-path keeps what fits and starts with a new head') from e
    return model


def check_classifier(model: Any) -> None:
    """Refuse to measure a model whose classifier is not in its weights.

    Raises:
        UserError: Says what the weights have in its place.
    """
    loaded: LoadedWeights | None = model.loaded_weights
    names = model.pretrained_cfg.get('classifier') or ()
    prefixes = tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names))
    new = [name for name in loaded.new if name.startswith(prefixes)] if loaded else []
    if loaded and new:
        saved = model.pretrained_cfg.get('source') and model.pretrained_cfg['num_classes']
        classes = loaded.classes or (saved if saved != model.num_classes else None)
        has = f'is for {classes} classes' if classes else 'is missing or of another kind'
        fix = f'give --num-classes {classes}' if classes else 'give weights that have it'
        raise UserError(f'{loaded.source}: the classifier in it {has}; the model has {model.num_classes} classes and '
                        f'would be measured with a random one ({first_names(new)}); {fix}')


def _file_flag(config: TrainConfig | ValidateConfig) -> str:
    return 'pretrained_path ' if config.pretrained_path else 'initial_checkpoint ' if config.initial_checkpoint else ''


def _reason(name: str, error: Exception) -> str | None:
    """What was wrong when timm made a model; None for an error that no input explains."""
    if reason := explain(error):
        return reason
    if isinstance(error, (TypeError, ValueError, AssertionError, AttributeError)):
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            return _unknown_option(name, unknown[1])
        return f'{one_line(error).rstrip(".")}; check --model-kwargs and the image size'
    return one_line(error) if isinstance(error, (RuntimeError, OSError, KeyError)) else None


def check_model_name(name: str) -> None:
    """Make a ``<timm backbone>_<head>`` name known to timm, and refuse unknown names.

    Raises:
        UserError: Names the nearest known models.
    """
    try:
        source, name = parse_model_name(name)
    except ValueError as e:  # a path or the name of a repository without its prefix
        raise UserError(f'model {name}: {one_line(e)}') from e
    if source:
        _check_source(source, name)
        return
    arch = split_model_name_tag(name)[0]
    if timm_spinal.ensure_registered(arch) or timm.is_model(arch):
        return
    near = difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.5)
    hint = f'the nearest are {", ".join(near)}' if near else "'timm-spinal list' shows all"
    converted = ' and '.join(f'{prefix}<timm model>' for prefix in timm_spinal.CONVOLUTIONS)
    raise UserError(f'unknown model {arch!r}; {hint}; any <timm model>_<head> and {converted} '
                    f'work too (heads: {", ".join(timm_spinal.HEADS)}; timm_spinal.register_head_variant)')


def _unknown_option(model: str, option: str) -> str:
    head = split_model_name_tag(model)[0].rpartition('_')[2]
    known = [f'head_{name}' for name in timm_spinal.head_options(head)] if head in timm_spinal.HEADS else []
    hint = f"; its head takes {', '.join(known)}" if known and option.startswith('head_') else '; see --model-kwargs'
    return f'unknown option {option!r}{hint}'


def needs_registration(arch: str) -> bool:
    """Whether a fresh process has to register an architecture of ours beyond importing timm_spinal."""
    return arch in timm_spinal.list_models() and arch not in _REGISTERED_ON_IMPORT


def _check_source(source: str, name: str) -> None:
    """Register the architecture that a saved model names."""
    load = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
    try:
        cfg, architecture, args = load(name)
        # timm puts the sizes of an argument in as tuples
        found = dict(architecture=architecture, model_args=args, pretrained_cfg={
            k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()})
        if wrong := wrong_type(found, CONFIG_TYPES):
            raise ValueError(f'its config.json is damaged: {wrong}')
    except Exception as e:
        check_download(f'model {source}:{name}', f'{source}:{name}')
        reason = explain(e) or (one_line(e) if isinstance(e, (OSError, ValueError, RuntimeError)) else None)
        if isinstance(e, (json.JSONDecodeError, UnicodeDecodeError, RecursionError)):
            reason = f'its config.json is not valid JSON ({one_line(e)})'
        if isinstance(e, (TypeError, AttributeError)):
            reason = 'its config.json has other content than timm writes; restore it'
        if isinstance(e, KeyError):
            reason = (f'its config.json has no {e}, so it is not a classifier of timm; to open a detector, use '
                      'timm_spinal.detection.load_detector')
        if isinstance(e, FileNotFoundError) and source == 'local-dir':
            reason = 'there is no such folder, or no config.json in it; give the folder of a run'
        if reason is None:
            raise
        raise UserError(f'model {source}:{name}: {reason}') from e
    check_model_name(architecture)


def _apply_settings(model: Any, config: TrainConfig | ValidateConfig) -> None:
    """The options of timm's train.py that change a model after it is made."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = module.momentum if config.bn_momentum is None else config.bn_momentum
            module.eps = module.eps if config.bn_eps is None else config.bn_eps
    classifier = model.get_classifier()
    with torch.no_grad():
        if config.head_init_scale is not None:
            classifier.weight.mul_(config.head_init_scale)
        if config.head_init_bias is not None:
            classifier.bias.fill_(config.head_init_bias)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)


def count_statistics_once(model: nn.Module) -> None:
    """Keep BatchNorm layers from counting a batch again when its activations are computed again in the backward pass.

    Args:
        model: With gradient checkpointing, which runs parts of it once more within the backward pass.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(_stop_counting)
            # always: checkpointing ends the second forward pass by an exception as soon as it has what it needs
            module.register_forward_hook(_count_again, always_call=True)


def _stop_counting(module: Any, inputs: Any) -> None:
    # a compiled model is left to the compiler, which keeps side effects out of what it computes twice
    if module.training and not torch.compiler.is_compiling() and _TRACKER.is_bw:
        # to checkpointing both passes must look alike, so the statistics are still passed on
        module.counted = module.momentum
        module.momentum = 0.
        module.num_batches_tracked.sub_(1)


def _count_again(module: Any, inputs: Any, output: Any) -> None:
    if hasattr(module, 'counted'):
        module.momentum = module.counted
        del module.counted


@torch.no_grad()
def check_batch_of_one(model: nn.Module, input_size: tuple[int, ...], kept_in_eval: list[nn.Module]) -> None:
    """Refuse to train a model on one image when a BatchNorm layer of it would see a single value per channel.

    Args:
        model: Tried on its device; buffers, mode and random states are as before afterwards.
        input_size: (C, H, W).
        kept_in_eval: BatchNorm layers that do not train.

    Raises:
        UserError: The model cannot train on a batch of one.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
            model.train()
            for module in kept_in_eval:
                module.eval()
            model(torch.zeros(1, *input_size, device=device))
    except ValueError as e:
        if 'more than 1 value per channel' not in str(e):
            raise
        raise UserError('--batch-size 1: a BatchNorm layer of the model needs at least 2 images in training; use '
                        '--batch-size 2 with more --grad-accum-steps, or a model without BatchNorm') from e
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def fit_momentum(
        model: nn.Module,
        updates: int,
        options: Mapping[str, Any],
        kept_in_eval: Sequence[nn.Module] = (),
) -> list[str]:
    """Raise the momentum of slow BatchNorm layers in a short run, so that their running statistics keep up.

    The statistics remember about 1 / momentum updates; a run is to have 20 times as many. So the 0.01 of the capsule
    heads, which is their authors', holds from 2,000 updates on, and shorter runs have up to 0.1, PyTorch's default.

    Args:
        model: Changed in place; layers with a momentum that is high enough stay as they are.
        updates: Updates of the whole run.
        options: Model arguments that were given; with a momentum among them, nothing changes.
        kept_in_eval: BatchNorm layers that do not train.

    Returns:
        A line that says what changed, if anything did.
    """
    momentum = min(FAST_MOMENTUM, WINDOWS / updates)
    still = {id(module) for module in kept_in_eval}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in still]
    slow = [norm for norm in norms if norm.momentum is not None and norm.momentum < momentum]
    if not slow or any('momentum' in name for name in options):
        return []
    lowest = min(norm.momentum or 0. for norm in slow)
    for norm in slow:
        norm.momentum = momentum
    return [f'BatchNorm momentum of {len(slow)} layers: {momentum:.2g} in place of {lowest:g}, for a run of {updates} '
            f'updates']


def binary_signs(model: nn.Module) -> torch.Tensor:
    """The signs of all binary weights of a model, one after the other, as booleans on the CPU: (W,).

    A layer that xnorizes its weights in every forward, the projector of XnODR, has ``xnor_projector`` set. Its weights
    stay floats in training; their signs and scales alone reach the output. A sign is +1 where the weight is above 0.
    """
    weights = [getattr(m, 'weight', None) for m in model.modules() if getattr(m, 'xnor_projector', False)]
    signs = [(w.detach() > 0).flatten().cpu() for w in weights if isinstance(w, nn.Parameter)]
    return torch.cat(signs) if signs else torch.zeros(0, dtype=torch.bool)


def binary_weight_flips(before: torch.Tensor, model: nn.Module) -> float | None:
    """Percent of the binary weights of a model whose sign is another than before; None when it has none.

    Args:
        before: `binary_signs` of the model before.
        model: The model.
    """
    if not len(before):
        return None
    return 100. * (binary_signs(model) != before).double().mean().item()
