"""The file of a sweep: shared options, variants and seeds, all checked before anything runs.

    output: output/compare/cifar10_heads     # not given: output/compare/NAME OF THE FILE
    seeds: 3                                 # or [0, 1, 2]
    control: linear                          # not given: the first variant
    shared:                                  # any options of the trainer
      data_dir: data/cifar10
      epochs: 10
    variants:                                # each a name and the options that make it
      linear: {model: resnet18_linear}
      spinal: {model: resnet18_spinal, model_kwargs: {head_width: 256}}
      mlp=spinal:                            # an MLP head with as many parameters as that of spinal
      wld:                                   # its teacher is the run of linear with the same seed
        {model: resnet18, kd_model_name: 'variant:linear', kd_distill_type: wld}
    tune:                                    # optional: the same grid for every variant
      lr: [0.01, 0.1]
      weight_decay: [0.0001]
"""
import dataclasses
import itertools
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

import timm_spinal
from timm_spinal.cost import count_params
from timm_spinal.errors import UserError
from timm_spinal.files import read_yaml
from timm_spinal.layers import HEADS, equal_size_mlp_width
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.model import check_model_name
from timm_spinal.training.parser import load_yaml, unknown_keys
from timm_spinal.training.report import write_text
from timm_spinal.training.run_dir import check_name

from .controls import CONTROL, slug
from .options import parse_seeds

_KEYS = ('output', 'seeds', 'control', 'shared', 'variants', 'tune')
TEACHER = 'variant:'  # start of a kd_model_name that is another variant
_OURS = ('seed', 'output', 'experiment', 'resume')  # the sweep sets these


@dataclass
class Sweep:
    """A checked sweep.

    Attributes:
        output: Folder of the comparison.
        configs: For each variant, its config without seed and folder; controls that are to be sized lack their width.
        sized_as: Control of equal size -> variant.
        grid: Changes to try when tuning, none for no tuning.
    """
    output: Path
    seeds: list[int]
    control: str
    configs: dict[str, TrainConfig]
    sized_as: dict[str, str] = field(default_factory=dict)
    grid: list[dict[str, Any]] = field(default_factory=list)


def read_sweep(path: Path, output: str = '', data_dir: str = '') -> Sweep:
    """Read and check the file of a sweep.

    Args:
        path: The YAML file.
        output: Folder of the comparison, over that of the file.
        data_dir: Folder of the data, over that of the file.

    Raises:
        UserError: No such file, an unknown key or option (all variants are checked first), an empty list of seeds.
    """
    raw = read_yaml(path, 'sweep', 'write the keys shared, variants and seeds into a YAML file and give it to --sweep')
    if unknown := [key for key in raw if key not in _KEYS]:
        other = f'it has {", ".join(_KEYS)}'
        raise UserError(f'sweep {path}: {unknown_keys(unknown, dict.fromkeys(_KEYS, ""), other)}')
    variants = raw.get('variants')
    if not isinstance(variants, dict) or not variants:
        raise UserError(f'sweep {path}: no variants; write at least one name with its options under "variants"')
    variants = {str(name): options or {} for name, options in variants.items()}
    shared = _options(path, 'shared', raw.get('shared') or {})
    configs, sized_as = {}, {}
    for name, options in variants.items():
        like = name.partition('=')[2] if name.startswith(f'{CONTROL}=') and not options.get('model') else ''
        if like:
            if like not in variants:
                raise UserError(f'sweep {path}: {name} takes its size from {like}, which is not among the variants')
            sized_as[name] = like
            options = {**_without_head(variants[like]), **options, 'model': _control_model(path, variants, like)}
        values = _options(path, f'variant {name}', options)
        kwargs = {**shared.get('model_kwargs', {}), **values.pop('model_kwargs', {})}
        values.update(model_kwargs=kwargs, **(dict(data_dir=data_dir) if data_dir else {}))
        configs[name] = TrainConfig(**{**shared, **values})
        check_model_name(configs[name].model)
    _check_names(path, configs)
    _check_teachers(path, configs, bool(raw.get('tune')))
    control = str(raw.get('control') or next(iter(configs)))
    if control not in configs:
        raise UserError(f'sweep {path}: control {control!r} is not among the variants {", ".join(configs)}')
    return Sweep(
        Path(output or raw.get('output') or f'output/compare/{path.stem}'),
        parse_seeds(raw.get('seeds', 3), f'sweep {path}: seeds'),
        control, configs, sized_as, _grid(path, raw.get('tune')))


def size_control(sweep: Sweep, name: str, num_classes: int) -> TrainConfig:
    """The config of a variant; a control gets the width by which its head has as many parameters as its model's.

    Raises:
        UserError: A model that cannot be built.
    """
    config = sweep.configs[name]
    if name not in sweep.sized_as:
        return config
    like = sweep.configs[sweep.sized_as[name]]
    try:
        with torch.device('meta'):
            head: Any = timm.create_model(like.model, num_classes=num_classes, **like.model_kwargs).attached_head
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f'variant {name}: the number of parameters of {like.model} is not known '
                        f'({" ".join(str(e).split())})') from e
    width = equal_size_mlp_width(count_params(head), head.in_features, num_classes)
    return replace(config, model_kwargs={**config.model_kwargs, 'head_width': width})


def _options(path: Path, where: str, options: Any) -> dict[str, Any]:
    """Options checked as those of a config file."""
    if not isinstance(options, dict):
        raise UserError(f'sweep {path}: {where} has no options; write lines like "epochs: 3"')
    taken = [key for key in options if key in _OURS]
    if taken:
        raise UserError(f'sweep {path}: {where}: {taken[0]} is set for every run by the sweep; leave it out')
    with tempfile.TemporaryDirectory() as folder:
        # through a file, so that the trainer's own checks of a config file are the ones that are made
        temp = Path(folder) / 'options.yaml'
        temp.write_text(yaml.safe_dump(options), encoding='utf-8')
        try:
            return load_yaml(temp)
        except UserError as e:
            raise UserError(str(e).replace(f'config {temp}', f'sweep {path}: {where}')) from e


def _without_head(options: Any) -> dict[str, Any]:
    options = dict(options or {})
    kwargs = options.get('model_kwargs') or {}
    return dict(options, model_kwargs={k: v for k, v in kwargs.items() if not k.startswith('head_')})


def _control_model(path: Path, variants: dict[str, Any], like: str) -> str:
    model = str((variants[like] or {}).get('model', ''))
    backbone, _, head = model.rpartition('_')
    if head not in HEADS or not timm_spinal.ensure_registered(model):
        raise UserError(f'sweep {path}: {CONTROL}={like} needs a variant {like} whose model is <timm model>_<head>; '
                        f'{model or "the empty model"} is not of this form')
    return f'{backbone}_{CONTROL}'


def _check_names(path: Path, configs: dict[str, TrainConfig]) -> None:
    folders: dict[str, str] = {}
    for name in configs:
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise UserError(f'sweep {path}: the variants {other!r} and {name!r} would share a folder; rename one')
        check_name(slug(name), f'sweep {path}: variant')


def _check_teachers(path: Path, configs: dict[str, TrainConfig], tuned: bool) -> None:
    before: list[str] = []
    for name, config in configs.items():
        teacher = teacher_of(config)
        if teacher and teacher not in before:
            raise UserError(f'sweep {path}: variant {name}: its teacher {teacher} is not among the variants before it; '
                            'write the teacher first')
        if teacher and tuned:
            raise UserError(f'sweep {path}: tune: variant {name} has a variant as its teacher, of which there would be '
                            'several; give it a run folder')
        before.append(name)


def teacher_of(config: TrainConfig) -> str:
    """The variant whose run of the same seed is the teacher of a config; '' where it is none."""
    name = config.kd_model_name or ''
    return name.removeprefix(TEACHER) if name.startswith(TEACHER) else ''


def _grid(path: Path, tune: Any) -> list[dict[str, Any]]:
    if not tune:
        return []
    if not isinstance(tune, dict) or not all(isinstance(v, list) and v for v in tune.values()):
        raise UserError(f'sweep {path}: tune: write lists of values, such as lr: [0.01, 0.1]')
    points = [dict(zip(tune, values)) for values in itertools.product(*tune.values())]
    return [_options(path, 'tune', point) for point in points]


def write_config(path: Path, config: TrainConfig) -> None:
    """Write a config for a run, only what differs from the defaults."""
    default = TrainConfig()
    values = {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(default, k)}
    write_text(path, yaml.safe_dump(values, sort_keys=False))
