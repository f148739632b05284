"""The exact state of a run, written so that a kill at any instant leaves a usable one.

``RUN/last/step-00000120/`` holds what `Accelerator.save_state` writes (weights, optimizer, scaler, every random state
of every process), the moving average (``ema.safetensors``), the counters and the config (``state.json``), and
``manifest.json`` with the size and SHA-256 of each file. All of it is written under a temporary name, flushed, and
renamed: a folder with the final name is complete or its manifest says that it is not.

Weights are safetensors; the optimizer and random states are read with ``weights_only=True``.
"""
import json
import os
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, gather_object, load
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from timm_spinal.errors import UserError
from timm_spinal.files import fsync, sha256, write_error

from .distributed import NotFinite
from .optim import apply_settings, load_scheduler_state, scheduler_state
from .options import option_names
from .resume_checks import OF_OPTIMIZER, changed_settings
from .sharded import errors_of_shards, local_tensor

if TYPE_CHECKING:
    from .run import Run

STATE, EMA, MANIFEST = 'state.json', 'ema.safetensors', 'manifest.json'
_NAME = re.compile(r'step-(\d{8,})(\.old)?$')
Say = Callable[[str], None]


def save(run: 'Run') -> None:
    """Write a checkpoint of the current state of a run. Every process must call it.

    Raises:
        NotFinite: A weight is NaN or infinite; nothing is written.
        UserError: The disk is full or refuses; the older checkpoints are kept.
    """
    weights = [local_tensor(p.detach()) for p in run.task.trained.parameters()]
    bad = torch.stack([~weight.isfinite().all() for weight in weights]).sum()
    if run.accelerator.reduce(bad.to(run.accelerator.device)).item():
        raise NotFinite(f'a weight is NaN or infinite after update {run.progress.updates}')
    state = dict(
        progress=asdict(run.progress),
        scheduler=scheduler_state(run.scheduler),
        processes=run.accelerator.num_processes,
        cwd=os.getcwd(),  # where relative paths of the config start
        **run.problem.describe(),
    )
    ema = run.task.get_trainable_module(ema=True)
    save_checkpoint(
        run.accelerator, run.folder / 'last', run.progress.updates, state, ema, run.config.checkpoint_hist)


def save_checkpoint(
        accelerator: Accelerator,
        folder: Path,
        step: int,
        state: dict[str, Any],
        ema: nn.Module | None,
        keep: int,
) -> Path:
    """Write one checkpoint, remove the oldest beyond ``keep``, and those of later steps. Every process must call it.

    Later steps are there when a run was resumed from an earlier one; they are of a course that was left.

    Args:
        accelerator: Owner of weights, optimizer and random states.
        folder: Folder of all checkpoints (``RUN/last``).
        step: Updates done, the name of the checkpoint.
        state: Whatever else the run needs, as JSON types.
        ema: The averaged model.
        keep: Number of checkpoints kept.

    Raises:
        UserError: The disk is full or refuses; what was written is removed and the older checkpoints are kept.
    """
    final = folder / f'step-{step:08d}'
    temp = folder / f'.{final.name}.tmp'
    main = accelerator.is_main_process

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob('.*.tmp'):
            shutil.rmtree(stale)
        temp.mkdir()

    def write() -> None:
        with errors_of_shards():
            accelerator.save_state(str(temp))

    def finish() -> None:
        if ema is not None:
            save_model(ema, str(temp / EMA))
        (temp / STATE).write_text(json.dumps(state))
        _write_manifest(temp)
        _put_in_place(temp, final)
        checkpoints = find_checkpoints(folder)
        now = checkpoints.index(final)
        for other in checkpoints[:now] + checkpoints[now + keep:]:
            shutil.rmtree(other)

    try:
        _on_all(accelerator, begin if main else None, final)
        _on_all(accelerator, write, final)
        _on_all(accelerator, finish if main else None, final)
    except UserError:
        if main:
            shutil.rmtree(temp, ignore_errors=True)
        raise
    return final


def _on_all(accelerator: Accelerator, action: Callable[[], Any] | None, final: Path) -> None:
    """Run an action; when it fails to write on one process, every process raises the same error."""
    reason = None
    try:
        if action is not None:
            action()
    except Exception as e:
        if (reason := write_error(e)) is None:
            raise
    reasons = [r for r in gather_object([reason]) if r]
    if reasons:
        raise UserError(f'cannot write checkpoint {final}: {reasons[0]}; the checkpoint before it is kept: '
                        'make room, then continue with --resume')


def _write_manifest(temp: Path) -> None:
    files = sorted(p for p in temp.rglob('*') if p.is_file())
    entries = {str(p.relative_to(temp)): dict(size=p.stat().st_size, sha256=sha256(p)) for p in files}
    manifest = temp / MANIFEST
    manifest.write_text(json.dumps(dict(files=entries), indent=1))
    for path in [*files, manifest, temp]:
        fsync(path)


def _put_in_place(temp: Path, final: Path) -> None:
    """Rename. A checkpoint of the same step gets another name first, so that one of them is found at any time."""
    old = final.with_name(final.name + '.old')
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(final, old)
    os.rename(temp, final)
    fsync(final.parent)
    if old.exists():
        shutil.rmtree(old)


# ---- reading ----------------------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of one checkpoint of a run, by its name and the folder that it is in."""
    return bool(_NAME.match(path.name)) and path.parent.name == 'last'


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first, whole or not."""
    if not folder.is_dir():
        return []
    steps = [(int(m[1]), not m[2], p) for p in folder.iterdir() if (m := _NAME.match(p.name))]
    return [p for *_, p in sorted(steps, reverse=True)]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as it was written."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text())['files']
        for name, entry in entries.items():
            path = checkpoint / name
            if not path.is_file():
                return f'{name} is missing'
            if path.stat().st_size != entry['size']:
                return f'{name} has {path.stat().st_size} bytes instead of {entry["size"]}'
            if sha256(path) != entry['sha256']:
                return f'{name} has another checksum than it was written with'
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f'{MANIFEST} cannot be read ({type(e).__name__})'
    return None


def newest_whole(checkpoints: list[Path], say: Say) -> Path | None:
    """The first checkpoint of a list that is not damaged; says which ones it passes over, and why.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    for i, checkpoint in enumerate(checkpoints):
        if (reason := damage(checkpoint)) is None:
            return checkpoint
        before = f'falling back to {checkpoints[i + 1]}' if i + 1 < len(checkpoints) else 'there is none before it'
        say(f'checkpoint {checkpoint} is damaged ({reason}): {before}')
    if checkpoints:
        raise UserError(f'no usable checkpoint in {checkpoints[0].parent}: all {len(checkpoints)} are damaged; '
                        'move this folder away to start a new run')
    return None


def choose_checkpoint(resume: str, run_folder: Path | None, say: Say) -> Path | None:
    """The checkpoint that ``--resume`` means.

    Args:
        resume: ``auto`` (newest of the run folder, None when it has none), a run folder or a checkpoint folder.
        run_folder: Folder of this run, needed by ``auto``.
        say: Gets a line for each damaged checkpoint that is passed over.

    Raises:
        UserError: A path that holds no checkpoint, or only damaged ones.
    """
    if resume == 'auto':
        return newest_whole(find_checkpoints(run_folder / 'last'), say) if run_folder else None
    return newest_whole(candidates(resume), say)


def candidates(resume: str) -> list[Path]:
    """The checkpoints, whole or not, of a path that was given to ``--resume``; the one that is meant first.

    Raises:
        UserError: There are none.
    """
    path = Path(resume).absolute()
    if is_checkpoint(path):
        checkpoints = find_checkpoints(path.parent)
        checkpoints = checkpoints[checkpoints.index(path):] if path in checkpoints else []
    else:
        checkpoints = find_checkpoints(path / 'last')
    if not checkpoints:
        raise UserError(f'resume {resume}: no checkpoint there; give a run folder, one of its last/step-* folders, '
                        'or auto')
    return checkpoints


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def restore(run: 'Run', checkpoint: Path) -> None:
    """Put the state of a checkpoint back into a run. Nothing may draw random numbers between this and the loop.

    Raises:
        UserError: The checkpoint does not fit the model or the optimizer, or is of another version.
    """
    accelerator, progress, state = run.accelerator, run.progress, read_state(checkpoint)
    changed = changed_settings(state['config'], asdict(run.config), cls=type(run.config))
    silent = option_names(type(run.config), on_resume='silent')
    for name in [name for name in changed if name not in silent]:
        accelerator.print(f'resuming with another {name}: {changed[name]}')
    settings = [dict(group) for group in run.optimizer.param_groups]
    missing = load_checkpoint(accelerator, checkpoint, run.task.get_trainable_module(ema=True))
    try:
        load_scheduler_state(run.scheduler, state['scheduler'])
    except (KeyError, TypeError) as e:
        raise other_version(checkpoint, e) from e
    if changed.keys() & OF_OPTIMIZER:
        apply_settings(run.optimizer, settings, run.scheduler, progress.epoch, progress.updates)
    progress.stopped_early &= 0 < run.config.early_stop_patience <= progress.stale
    if state['processes'] != accelerator.num_processes:  # random states cannot be the same
        accelerator.print(f'resuming with {accelerator.num_processes} processes instead of {state["processes"]}: '
                          'the result will not be bit-identical')
    elif unread := [reason for reason in gather_object([missing]) if reason]:
        accelerator.print(f'warning: random states of {checkpoint} cannot be read ({unread[0]}): the run goes on with '
                          'new ones, and the result will not be bit-identical')
    accelerator.print(f'resuming from {checkpoint}: epoch {progress.epoch}, update {progress.updates}')


def other_version(checkpoint: Path, error: Exception) -> UserError:
    """The error about a checkpoint whose state has other entries than this version writes."""
    return UserError(f'cannot resume {checkpoint}: it was written by another version of timm_spinal ({error}); use '
                     'that one, or start a new run from its weights with --initial-checkpoint')


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: nn.Module | None) -> str:
    """Put weights, optimizer, random states and moving average back. Nothing may draw random numbers after it.

    Returns:
        Why the random states of this process could not be put back; '' where they are.

    Raises:
        UserError: The weights or the state of the optimizer are not those of this run's.
    """
    try:
        with errors_of_shards():
            accelerator.load_state(str(checkpoint))
        if ema is not None:
            load_model(ema, str(checkpoint / EMA))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, SafetensorError,
            UnpicklingError) as e:
        raise UserError(f'cannot resume {checkpoint}: its state does not fit this run ({" ".join(str(e).split())[:300]}'
                        '); resume with the versions and the kind of launch that it was written with, or start a new '
                        'run from its weights with --initial-checkpoint') from e
    return _missing_random_states(accelerator, checkpoint)


def _missing_random_states(accelerator: Accelerator, checkpoint: Path) -> str:
    """Whether Accelerate, which says nothing about it, has failed to put the random states back, and why."""
    name = f'{RNG_STATE_NAME}_{accelerator.process_index}.pkl'
    try:
        states = load(checkpoint / name)
        same = [random.getstate() == states['random_state'],
                all(map(np.array_equal, np.random.get_state(), states['numpy_random_seed'])),
                torch.equal(torch.get_rng_state(), states['torch_manual_seed'])]
        if accelerator.device.type == 'cuda':
            same += map(torch.equal, torch.cuda.get_rng_state_all(), states['torch_cuda_manual_seed'])
    except Exception as e:  # a file that is none makes pickle, zipfile and torch raise what they like
        return f'{name}: {type(e).__name__}: {" ".join(str(e).split())[:200]}'
    return '' if all(same) else f'{name}: not taken by this version of Accelerate'
