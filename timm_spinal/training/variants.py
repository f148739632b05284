"""What runs differ in beside where and how they were made."""
from typing import Any, Sequence

from .config import TrainConfig
from .identity import WITHOUT_EFFECT


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the options in which some runs differ, other than the seed and those that change no result."""
    names = settings[0].keys() - WITHOUT_EFFECT - {'seed'}
    return [k for k in settings[0] if k in names and any(_used(k, s) != _used(k, settings[0]) for s in settings)]


def label(values: dict[str, Any], names: list[str]) -> str:
    """A run's name among others that differ in these options."""
    parts = [str(values[k]) if k == 'model' else f'{k}={_used(k, values)}' for k in names]
    return ', '.join(parts) or str(values['model'])


def _used(name: str, values: dict[str, Any]) -> Any:
    """A value; a precision that is not given is accelerate's own, since what a launch sets is kept with the run."""
    return values[name] or 'no' if name == 'mixed_precision' else values[name]


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """All options of a run of which a YAML file sets some."""
    return {**vars(TrainConfig()), **values}
