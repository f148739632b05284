"""What runs differ in beside where and how they were made."""
from dataclasses import fields
from typing import Any, Sequence

from .config import TrainConfig
from .options import LoaderOptions, RunOptions

# where and how a run was made, not what was trained
ASIDE = {f.name for options in (RunOptions, LoaderOptions) for f in fields(options)} - {'batch_size'}


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the options in which some runs differ, the seed aside."""
    return [k for k in settings[0] if k not in ASIDE and any(s[k] != settings[0][k] for s in settings)]


def label(values: dict[str, Any], names: list[str]) -> str:
    """A run's name among others that differ in these options."""
    parts = [str(values[k]) if k == 'model' else f'{k}={values[k]}' for k in names]
    return ', '.join(parts) or str(values['model'])


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """All options of a run of which a YAML file sets some."""
    return {**vars(TrainConfig()), **values}
