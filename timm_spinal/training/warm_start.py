"""A run of an IC model that starts nearly as the plain model whose weights it has (``--ic-warm-start``)."""
from accelerate import Accelerator
from torch import nn

import timm_spinal
from timm_spinal.errors import UserError

from .config import TrainConfig
from .data import TrainData


def check_warm_start(config: TrainConfig) -> None:
    """Refuse a warm start from nothing.

    Raises:
        UserError: Names the way out.
    """
    if config.ic_warm_start is not None and not (config.pretrained or config.pretrained_path):
        raise UserError('--ic-warm-start: there are no weights to keep; add --pretrained, or --pretrained-path with '
                        'the model.safetensors of a plain model')


def warm_start(config: TrainConfig, model: nn.Module, data: TrainData, accelerator: Accelerator) -> None:
    """Choose w' and estimate BatchNorm statistics anew on training images, augmented but not mixed.

    Every process looks at the same batches.

    Raises:
        UserError: A model without collisions, or with BatchNorm in them.
    """
    assert config.ic_warm_start is not None
    data.set_epoch(0)
    try:
        shares = timm_spinal.ic_warm_start(model, data.train_loader, config.ic_warm_start)
    except ValueError as e:
        raise UserError(f'--ic-warm-start: {e}') from e
    accelerator.print(f'warm start: {len(shares)} collisions, active at {100 * min(shares.values()):.1f} to '
                      f'{100 * max(shares.values()):.1f} % of their places')
