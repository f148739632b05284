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
# settings that name a file or a folder, or may do so
PATHS = ('data_dir', 'pretrained_path', 'initial_checkpoint', 'class_map', 'kd_model_name', 'kd_cache')
LOCAL = ('local-dir:', 'hfds/', 'hfids/')  # before a folder in the place of the name of a model or data set
# no word is lost about a change of these
SILENT = WITHOUT_EFFECT | {'epochs', 'stop_epoch', 'early_stop_patience'}
# a change of these must reach the optimizer and the schedule, whose state is loaded over the new settings
SCHEDULE = {f.name for options in (OptimizerOptions, ScheduleOptions) for f in fields(options)} - {'stop_epoch'}


def changed_settings(saved: dict[str, Any], now: dict[str, Any], cwd: str = '') -> dict[str, str]:
    """Settings that differ between two configs, each as ``old -> new``; two names of one file are the same.

    Args:
        saved: Settings of before.
        now: Settings of now.
        cwd: The folder from which relative paths of before started; '' is that of now.
    """
    return {k: f'{saved[k]!r} -> {now[k]!r}' for k in now if k in saved and not _same(k, saved[k], now[k], cwd)}


def check_same_run(
        saved: dict[str, Any],
        now: dict[str, Any],
        where: str,
        fixed: tuple[str, ...] = FIXED,
) -> dict[str, str]:
    """Refuse to go on with another model or data.

    Args:
        saved: ``config``, ``data`` (a description of the data as found) and ``cwd`` of the checkpoint.
        now: ``config`` and ``data`` of this run.
        where: Name of the checkpoint for the message.
        fixed: Settings that must be the same.

    Returns:
        The other settings that changed, each as ``old -> new``.

    Raises:
        UserError: Names the keys that differ.
    """
    changed = changed_settings(saved['config'], now['config'], saved.get('cwd', ''))
    broken = {k: v for k, v in changed.items() if k in fixed}
    broken.update(changed_settings(saved['data'], now['data']))
    if broken:
        keys = ', '.join(f'{k} ({v})' for k, v in broken.items())
        raise UserError(f'cannot resume {where}: it was made with other settings: {keys}; undo the change, or start '
                        'a new run from its weights with --initial-checkpoint')
    return changed


def _same(key: str, old: Any, new: Any, cwd: str) -> bool:
    if isinstance(old, str) and isinstance(new, str) and old and new:
        prefix = next((p for p in LOCAL if old.startswith(p) and new.startswith(p)), '')
        if key in PATHS or prefix:
            before, now = _place(old.removeprefix(prefix), cwd), _place(new.removeprefix(prefix), '')
            # names on the Hub, and files of a working folder that was moved as a whole, are not there
            return before == now or old == new and not os.path.exists(before)
    return _plain(old) == _plain(new)


def _place(path: str, cwd: str) -> str:
    return os.path.realpath(os.path.join(cwd, os.path.expanduser(path)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
