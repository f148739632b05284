"""Which settings a resumed run may not change."""
import os
from dataclasses import fields
from typing import Any

from timm_spinal.errors import UserError

from .config import TrainConfig
from .options import OptimizerOptions, ScheduleOptions

# what another value of would make another model, other data or another kind of optimizer state
FIXED = (
    'model', 'num_classes', 'in_chans', 'img_size', 'input_size', 'gp', 'model_kwargs', 'freeze',
    'freeze_modules',
    'dataset', 'data_dir', 'train_split', 'val_split', 'val_split_fraction', 'class_map', 'train_num_samples',
    'batch_size', 'grad_accum_steps', 'seed', 'opt', 'layer_decay', 'model_ema', 'kd_model_name', 'kd_distill_type',
)
# where and how a run is made, not what is trained
WITHOUT_EFFECT = {f.name for f in fields(TrainConfig) if not f.metadata['changes_result']}
# no word is lost about a change of these
SILENT = WITHOUT_EFFECT | {'epochs', 'stop_epoch', 'early_stop_patience'}
# a change of these must reach the optimizer and the schedule, whose state is loaded over the new settings
SCHEDULE = {f.name for options in (OptimizerOptions, ScheduleOptions) for f in fields(options)} - {'stop_epoch'}


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Settings that differ between two configs, each as ``old -> new``."""
    return {k: f'{saved[k]!r} -> {now[k]!r}' for k in now if k in saved and _plain(k, saved[k]) != _plain(k, now[k])}


def check_same_run(
        saved: dict[str, Any],
        now: dict[str, Any],
        where: str,
        fixed: tuple[str, ...] = FIXED,
) -> dict[str, str]:
    """Refuse to go on with another model or data.

    Args:
        saved: ``config`` and ``data`` (a description of the data as found) of the checkpoint.
        now: The same of this run.
        where: Name of the checkpoint for the message.
        fixed: Settings that must be the same.

    Returns:
        The other settings that changed, each as ``old -> new``.

    Raises:
        UserError: Names the keys that differ.
    """
    changed = changed_settings(saved['config'], now['config'])
    broken = {k: v for k, v in changed.items() if k in fixed}
    broken.update(changed_settings(saved['data'], now['data']))
    if broken:
        keys = ', '.join(f'{k} ({v})' for k, v in broken.items())
        raise UserError(f'cannot resume {where}: it was made with other settings: {keys}; undo the change, or start '
                        'a new run from its weights with --initial-checkpoint')
    return changed


def _plain(key: str, value: Any) -> Any:
    if key == 'data_dir' and value or key == 'kd_model_name' and value and os.path.isdir(value):
        return os.path.realpath(value)
    return list(value) if isinstance(value, tuple) else value
