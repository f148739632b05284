"""How often the collision of each IC convolution of a model is active: a guard against dead branches.

    timm-spinal active-share icresnet50                                    # new: on noise, in train mode
    timm-spinal active-share output/train/RUN --images my/images/validation
    timm-spinal active-share icresnet18 --model-kwargs ic_scale=raw ic_init=576

A layer whose share is 0 % trains as a plain convolution, and gives w' no gradient; one with 100 % is linear. Models
with weights are looked at in eval mode.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader

from timm_spinal.cli import guard
from timm_spinal.errors import UserError
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.options import option


@dataclass
class ActiveShareConfig(ValidateConfig):
    """Share of active collisions"""
    images: str = option('', 'folder or tar of images, in folders by class; noise when not given')
    count: int = option(64, 'images', low=2)


def run(argv: list[str]) -> int:
    """``timm-spinal active-share``: returns 1 where a layer is dead or linear."""
    from timm_spinal.training.model import create_model
    from timm_spinal.training.parser import parse_config
    from timm_spinal.training.transforms import resolve_data
    config = parse_config(argv, ActiveShareConfig, 'timm-spinal active-share', __doc__, positional='model')
    asked = config.model
    name = f'local-dir:{asked}' if Path(asked).is_dir() else asked
    if '/' in name and ':' not in name:
        raise UserError(f'{name}: no such folder; a model on the Hub is hf-hub:{name}')
    config.model = name
    config.pretrained |= ':' in name  # a saved model
    model = create_model(config, config.num_classes).train(not config.pretrained)
    data = resolve_data(config, model)
    images = _open(config, data) if config.images else _noise(data, config.count)
    shares = _shares(model, images)
    return _tell(asked, shares)


def _shares(model: Any, batches: Any) -> dict[str, float]:
    import timm_spinal
    try:
        return timm_spinal.ic_active_share(model, batches)
    except ValueError as e:
        raise UserError(str(e)) from e


def _tell(name: str, shares: dict[str, float]) -> int:
    width = max(map(len, shares))
    for layer, share in shares.items():
        print(f'{layer:{width}}  {100 * share:6.2f} %')
    dead = [layer for layer, share in shares.items() if not 0. < share < 1.]
    print(f'{name}: {len(shares)} layers, {100 * min(shares.values()):.2f} to {100 * max(shares.values()):.2f} %, '
          + (f'{len(dead)} of them never or always active' if dead else 'each one active at some positions'))
    return int(bool(dead))


def _noise(data: dict[str, Any], count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield from torch.randn(count, *data['input_size'], generator=generator).split(16)


def _open(config: ActiveShareConfig, data: dict[str, Any]) -> DataLoader:
    """Images at equal distances in the folder, so that all classes take part."""
    from timm_spinal.training.dataset import ImageData
    from timm_spinal.training.splits import folder_split, passed_over_lines
    from timm_spinal.training.transforms import create_decoder
    folder, count = config.images, config.count
    if not Path(folder).exists():
        raise UserError(f'--images {folder}: no such folder')
    try:
        source = folder_split(Path(folder))
    except UserError as e:
        raise UserError(f'--images {folder}: {e}') from e
    if line := passed_over_lines(dict(images=source)):
        print(line)
    images = ImageData(source, create_transform(**data), create_decoder(config, data['input_size'][0]))
    chosen = range(0, len(images), max(1, len(images) // count))[:count]
    return DataLoader(images, sampler=[(i, None) for i in chosen], batch_size=16, collate_fn=images.collate)


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
