"""Small runs for the tests: a folder of noise images, a tiny timm model, and ways to stop a run."""
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file

from timm_spinal.training import task as task_module
from timm_spinal.training.checkpoint import find_checkpoints
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.train import train

from .images import make_folder


def small_config(tmp_path: Path, **options) -> TrainConfig:
    """Three epochs of five batches, 20 of 22 noise images; everything random is on."""
    if not (tmp_path / 'images').exists():
        make_folder(tmp_path / 'images', per_class=11, size=36)
    defaults = dict(
        data_dir=str(tmp_path / 'images'), model='test_efficientnet', img_size=32, batch_size=4, workers=0, epochs=3,
        epoch_repeats=20 / 22, warmup_epochs=0, lr=0.01, drop=0.2, output=str(tmp_path), experiment='run', seed=3,
        log_interval=100,
    )
    return TrainConfig(**{**defaults, **options})


RANDOM = dict(
    drop_path=0.2, mixup=0.4, cutmix=1., reprob=0.3, model_ema=True, model_ema_decay=0.8, grad_accum_steps=2,
    opt='adamw', sched_on_updates=True, checkpoint_steps=1, checkpoint_hist=3,
)


def last_state(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Weights, moving average and optimizer state at the end of a run."""
    newest = find_checkpoints(Path(config.output) / config.experiment / 'last')[0]
    state = {f'model.{k}': v for k, v in load_file(newest / 'model.safetensors').items()}
    if (newest / 'ema.safetensors').exists():
        state.update({f'ema.{k}': v for k, v in load_file(newest / 'ema.safetensors').items()})
    optimizer = torch.load(newest / 'optimizer.bin', weights_only=True)
    for i, slots in optimizer['state'].items():
        state.update({f'optimizer.{i}.{k}': v for k, v in slots.items() if isinstance(v, torch.Tensor)})
    return state


def assert_same_state(first: TrainConfig, second: TrainConfig) -> None:
    """Bit-identical weights, moving average and optimizer."""
    a, b = last_state(first), last_state(second)
    assert a.keys() == b.keys() and a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def snapshot(folder: Path) -> dict[Path, tuple]:
    """Everything below a folder, to see that nothing is written into it."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in folder.rglob('*')}


def at_update(monkeypatch, number: int, action: Callable[[], None]) -> None:
    """Do something in the forward pass of the given update, by a penalty of zero."""
    calls = []

    def penalty() -> torch.Tensor:
        calls.append(1)
        if len(calls) == number:
            action()
        return torch.zeros(())

    monkeypatch.setitem(task_module.PENALTIES, 'nothing', lambda config, model: penalty)


def send_signal(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


def train_until(monkeypatch, config: TrainConfig, update: int, error: BaseException) -> None:
    """Run until an error in the forward pass of an update."""
    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        at_update(patch, update, fail)
        try:
            train(config)
        except type(error):
            return
    raise AssertionError(f'the run ended before update {update}')


def resumed(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, resume='auto', **changes)


def command(config: TrainConfig, *flags: str) -> list[str]:
    """The run as a command line, by a YAML file beside the run folder."""
    from timm_spinal.training.config import to_yaml
    path = Path(config.output) / f'{config.experiment}.yaml'
    path.write_text(to_yaml(config))
    return [sys.executable, '-m', 'timm_spinal.train', '--config', str(path), *flags]
