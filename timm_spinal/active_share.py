"""How often the collision of each IC convolution of a model is active: a guard against dead branches.

    timm-spinal active-share icresnet50                                    # new: on noise, in train mode
    timm-spinal active-share output/train/RUN --images my/images/validation
    timm-spinal active-share icresnet18 --model-kwargs ic_scale=raw ic_init=576

A layer whose share is 0 % trains as a plain convolution, and gives w' no gradient; one with 100 % is linear. Models
with weights are looked at in eval mode.
"""
import sys
from pathlib import Path
from typing import Any, Iterator

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader

from timm_spinal.arguments import Parser, number
from timm_spinal.cli import guard
from timm_spinal.errors import UserError


def run(argv: list[str]) -> int:
    """``timm-spinal active-share``: returns 1 where a layer is dead or linear."""
    from timm_spinal.training.config import ValidateConfig, parse_config
    from timm_spinal.training.model import create_model
    from timm_spinal.training.transforms import resolve_data
    parser = Parser('timm-spinal active-share', f'{__doc__}\nFurther options: those of timm-spinal validate.')
    parser.add_argument('model', help='model name, run folder, local-dir:FOLDER or hf-hub:org/name')
    parser.add_argument('--images', help='folder or tar of images, in folders by class; noise when not given')
    parser.add_argument('--count', type=number(low=2), default=64, help='images (default: %(default)s)')
    args, rest = parser.parse_known_args(argv)
    name = f'local-dir:{args.model}' if Path(args.model).is_dir() else args.model
    if '/' in name and ':' not in name:
        raise UserError(f'{name}: no such folder; a model on the Hub is hf-hub:{name}')
    config = parse_config(['--model', name, *rest], cls=ValidateConfig, prog='timm-spinal active-share')
    config.pretrained |= ':' in name  # a saved model
    model = create_model(config, config.num_classes).train(not config.pretrained)
    data = resolve_data(config, model)
    images = _noise(data, args.count) if args.images is None else _open(config, args.images, data, args.count)
    shares = _shares(model, images)
    return _tell(args.model, shares)


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
          + (f'{len(dead)} dead or linear' if dead else 'none dead'))
    return int(bool(dead))


def _noise(data: dict[str, Any], count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield from torch.randn(count, *data['input_size'], generator=generator).split(16)


def _open(config: Any, folder: str, data: dict[str, Any], count: int) -> DataLoader:
    """Images at equal distances in the folder, so that all classes take part."""
    from timm_spinal.training.dataset import ImageData
    from timm_spinal.training.splits import folder_split, passed_over
    from timm_spinal.training.transforms import create_decoder
    if not Path(folder).exists():
        raise UserError(f'--images {folder}: no such folder')
    try:
        source = folder_split(Path(folder))
    except UserError as e:
        raise UserError(f'--images {folder}: {e}') from e
    if line := passed_over(dict(images=source)):
        print(line)
    images = ImageData(source, create_transform(**data), create_decoder(config, data['input_size'][0]))
    chosen = range(0, len(images), max(1, len(images) // count))[:count]
    return DataLoader(images, sampler=[(i, None) for i in chosen], batch_size=16, collate_fn=images.collate)


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
