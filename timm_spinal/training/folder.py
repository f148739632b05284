"""Where a run writes."""
import time
from pathlib import Path

from timm_spinal.errors import UserError

from .checkpoint import find_checkpoints
from .options import RunOptions


def run_folder(config: RunOptions, name: str) -> Path:
    """Folder of a run: ``output/experiment``, or that of the run which is resumed. Nothing is created.

    Args:
        config: The run's config.
        name: What a run without ``experiment`` is called, after the time.

    Raises:
        UserError: ``--resume auto`` without a name, or a new run where there already is one.
    """
    parent = Path(config.output or 'output/train').absolute()
    if config.resume == 'auto' and not config.experiment:
        raise UserError('--resume auto: which run is not known; add --experiment NAME, or give the run folder')
    if config.resume and not config.experiment:
        path = Path(config.resume).absolute()
        return path.parents[1] if path.name.startswith('step-') else path
    if not config.experiment:
        return _unused(parent / f'{time.strftime("%Y%m%d-%H%M%S")}-{name}')
    folder = parent / config.experiment
    if not config.resume and (find_checkpoints(folder / 'last') or (folder / 'result.json').exists()):
        raise UserError(f'run folder {folder} holds a run already; go on with --resume auto, or choose another '
                        '--experiment')
    return folder


def _unused(folder: Path) -> Path:
    """The folder, or its first free sister, for runs that start in the same second."""
    count, free = 1, folder
    while free.exists():
        count += 1
        free = folder.with_name(f'{folder.name}-{count}')
    return free
