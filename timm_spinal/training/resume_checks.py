"""How the options of runs differ: what a resumed run may not change, and what tells several runs apart."""
import os
from dataclasses import fields
from typing import Any, Sequence

from timm_spinal.errors import UserError

from .config import OptimizerOptions, ScheduleOptions, TrainConfig
from .options import Options, option_names

LOCAL = ('local-dir:', 'hfds/', 'hfids/')  # before a folder in the place of the name of a model or data set
# the state of optimizer and schedule is loaded over their settings, so these must be set again where they changed
OF_OPTIMIZER = {f.name for group in (OptimizerOptions, ScheduleOptions) for f in fields(group)}


def changed_settings(
        saved: dict[str, Any],
        now: dict[str, Any],
        cwd: str = '',
        cls: type[Options] = TrainConfig,
) -> dict[str, str]:
    """Settings that differ between two configs, each as ``old -> new``; two names of one file are the same.

    Args:
        saved: Settings of before.
        now: Settings of now.
        cwd: The folder from which relative paths of before started; '' is that of now.
        cls: Class of the config, which knows what is a path.
    """
    paths = option_names(cls, path=True)
    return {k: f'{saved[k]!r} -> {now[k]!r}' for k in now
            if k in saved and not _same(saved[k], now[k], cwd, k in paths)}


def check_same_run(
        saved: dict[str, Any],
        now: dict[str, Any],
        where: str,
        cls: type[Options] = TrainConfig,
) -> dict[str, str]:
    """Refuse to go on with another model or data.

    Args:
        saved: ``config``, ``data`` (a description of the data) and ``cwd`` of the checkpoint.
        now: ``config`` and ``data`` of this run.
        where: Name of the checkpoint for the message.
        cls: Class of the config, whose options say with ``on_resume`` which of them must be the same.

    Returns:
        The other settings that changed, each as ``old -> new``.

    Raises:
        UserError: Names the keys that differ.
    """
    changed = changed_settings(saved['config'], now['config'], saved.get('cwd', ''), cls)
    fixed = option_names(cls, on_resume='fixed')
    broken = {k: v for k, v in changed.items() if k in fixed}
    broken.update(changed_settings(saved['data'], now['data']))
    if broken:
        keys = ', '.join(f'{k} ({v})' for k, v in broken.items())
        raise UserError(f'cannot resume {where}: it was made with other settings: {keys}; undo the change, or start '
                        'a new run from its weights with --initial-checkpoint')
    return changed


def _same(old: Any, new: Any, cwd: str, is_path: bool) -> bool:
    if isinstance(old, str) and isinstance(new, str) and old and new:
        prefix = next((p for p in LOCAL if old.startswith(p) and new.startswith(p)), '')
        if is_path or prefix:
            before, now = _place(old.removeprefix(prefix), cwd), _place(new.removeprefix(prefix), '')
            # names on the Hub, and files of a working folder that was moved as a whole, are not there
            return before == now or old == new and not os.path.exists(before)
    return _plain(old) == _plain(new)


def _place(path: str, cwd: str) -> str:
    return os.path.realpath(os.path.join(cwd, os.path.expanduser(path)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ---- several runs -----------------------------------------------------------------------------------------------


def config_diff(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the options in which some runs differ, other than the seed and those that change no result."""
    names = configs[0].keys() & set(option_names(TrainConfig, changes_result=True)) - {'seed'}
    return [k for k in configs[0] if k in names and any(_used(k, c) != _used(k, configs[0]) for c in configs)]


def diff_label(config: dict[str, Any], names: list[str]) -> str:
    """What a run is called among others that differ in these options."""
    parts = [str(config[k]) if k == 'model' else f'{k}={_used(k, config)}' for k in names]
    return ', '.join(parts) or str(config['model'])


def _used(name: str, config: dict[str, Any]) -> Any:
    """A value; a precision that is not given is accelerate's own, since what a launch sets is kept with the run."""
    return config[name] or 'no' if name == 'mixed_precision' else config[name]


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """All options of a run of which a YAML file sets some."""
    return {**vars(TrainConfig()), **config}
