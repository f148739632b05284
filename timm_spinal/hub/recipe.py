"""How a run was made: the command that repeats it, its options, its data set and what it started from."""
import os
import shlex
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

import yaml
from timm.models import get_pretrained_cfg, parse_model_name

from timm_spinal.training.config import AUG, TrainConfig
from timm_spinal.training.options import option_names, to_flag
from timm_spinal.training.resume_checks import LOCAL

# names on the Hub of the sets that torchvision and scikit-learn carry, where there is one that is the same
HUB_DATASETS = {
    'torch/mnist': 'ylecun/mnist',
    'torch/fashion_mnist': 'zalando-datasets/fashion_mnist',
    'torch/cifar10': 'uoft-cs/cifar10',
    'torch/cifar100': 'uoft-cs/cifar100',
    'torch/food101': 'ethz/food101',
    'torch/imagenet': 'ILSVRC/imagenet-1k',
    'torch/oxford_iiit_pet': 'timm/oxford-iiit-pet',
    'torch/svhn': 'ufldl-stanford/svhn',
}


def shared_options(args: TrainConfig) -> dict[str, Any]:
    """The options of a run that others need; of a path outside the working folder only the last part."""
    recipe, paths = option_names(TrainConfig, recipe=True), option_names(TrainConfig, path=True)
    return {k: _shared(v, k in paths) if isinstance(v, str) else v for k, v in asdict(args).items() if k in recipe}


def _shared(value: str, is_path: bool) -> str:
    prefix = next((p for p in LOCAL if value.startswith(p)), '')
    path = PurePath(value.removeprefix(prefix))
    if prefix == 'local-dir:' or (is_path or prefix) and (path.is_absolute() or '..' in path.parts):
        return prefix + path.name
    return value


def hparams_yaml(args: TrainConfig) -> str:
    """``train_hparams.yaml``: a config that the trainer takes."""
    return yaml.safe_dump(shared_options(args), sort_keys=False, default_flow_style=None)


def command(args: TrainConfig, processes: int) -> str:
    """The command line that repeats a run, with the options that are not the trainer's defaults."""
    values, defaults = shared_options(args), TrainConfig()
    launch = ['accelerate', 'launch', *(['--num_processes', str(processes)] if processes > 1 else [])]
    words = [*launch, '-m', 'timm_spinal.train']
    without_effect = option_names(TrainConfig, requires=AUG) if args.no_aug else ()
    for name, value in values.items():
        if value != getattr(defaults, name) and name not in without_effect:
            words += _words(to_flag(name), value)
    lines, line = [], ''
    for word in map(shlex.quote, words):
        if word.startswith('--') and len(line) > 80:
            lines.append(line)
            line = '   '
        line = f'{line} {word}'.removeprefix(' ') if not line else f'{line} {word}'
    return ' \\\n'.join([*lines, line])


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else '--no-' + flag.removeprefix('--').removeprefix('no-')]
    if isinstance(value, dict):
        return [flag, *(f'{k}={v}' for k, v in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def dataset_name(args: TrainConfig | None) -> str:
    """The data set in words: its source, or the folder's name."""
    if args is None:
        return ''
    prefix, _, name = args.dataset.partition('/')
    if prefix.lower() in ('torch', 'hfds', 'hfids', 'wds', 'tfds'):
        return name
    return args.dataset or (os.path.basename(os.path.abspath(args.data_dir)) if args.data_dir else '')


def hub_dataset(args: TrainConfig | None) -> str:
    """The data set's name on the Hub, '' where it is not known."""
    if args is None:
        return ''
    prefix, _, name = args.dataset.partition('/')
    if prefix.lower() in ('hfds', 'hfids'):
        return name
    return HUB_DATASETS.get(args.dataset.lower(), '')


def base_model(args: TrainConfig | None) -> str:
    """The repository on the Hub whose weights a run started from, '' where there is none."""
    if not started_from_weights(args):
        return ''
    assert args is not None
    source, name = parse_model_name(args.model)
    if source == 'hf-hub':
        return name.partition('@')[0]
    if source:
        return ''
    cfg = get_pretrained_cfg(name)
    return str(cfg.hf_hub_id or '') if cfg is not None and not cfg.file else ''


def hub_page(args: TrainConfig | None) -> str:
    """Address of the weights that a run started from, '' where they are not on the Hub."""
    start = base_model(args)
    return f'https://hf.co/{start}' if start else ''


def started_from_weights(args: TrainConfig | None) -> bool:
    """Whether a run started from the weights of its model's name."""
    return args is not None and args.pretrained and not args.pretrained_path and not args.initial_checkpoint
