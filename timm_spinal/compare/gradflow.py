"""The gradient of shared filters over a training, with and without the orthogonality penalty.

    timm-spinal gradflow --model resnet32_sb_s16u1_cifar --data-dir my/images --epochs 5 --output output/gradflow
    timm-spinal gradflow --config my.yaml --sb-ortho-mode stage --grad-interval 5

Paper: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", Kang and Kim, NeurIPS 2021,
https://arxiv.org/abs/2006.05066. This command trains the same model twice with the same seed: with the penalty
(--sb-ortho, 10 if not given) and without. Every --grad-interval updates it records mean and max |dL/dB| of each basis
B. L is the loss without the penalty in both runs; the paper's code plots the gradient of loss and penalty.

The options are those of `timm-spinal train`. The command writes gradients.csv, gradients.png, gram.png, report.md and
the run folders with_penalty/ and without_penalty/. --resume auto continues a run that was stopped.
"""
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Sequence

import torch
from accelerate import PartialState
from timm.models import safe_model_name
from timm.utils import unwrap_model

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.options import Options, option, to_flag
from timm_spinal.training.parser import parse_config
from timm_spinal.training.report import write_table
from timm_spinal.training.results import write_result
from timm_spinal.training.run import Run
from timm_spinal.training.run_dir import check_name
from timm_spinal.training.train import open_run, train_epochs

from .gradflow_report import GradientRecord, read_records, write_gradients
from .gram import draw_gram, read_model, shared_bases
from .runs import RESULT

ROWS = 'gradients.csv'
ARMS = {'without_penalty': False, 'with_penalty': True}


@dataclass
class GradflowOptions(Options, applies_to=('training',), on_resume='silent', recipe=False):
    """Gradient flow"""
    grad_interval: int = option(10, 'record the gradients every so many updates', low=1)


@dataclass
class GradflowConfig(GradflowOptions, TrainConfig):
    """What ``timm-spinal gradflow`` takes: a run, and how often it is looked at."""


class GradientWatch:
    """Records mean and max |dL/dB| of the shared filters while a run trains; L is the loss without penalties.

    The gradient is computed on its own between forward and backward, which changes neither weights, gradients, running
    statistics nor random states of the run. Under several processes it is that of all their images; of an update with
    several batches it is that of the last.

    Args:
        run: A prepared run.
        interval: Updates from one record to the next.
        rows: Records to go on from, those of a run that is resumed.
    """

    def __init__(self, run: Run, interval: int, rows: Sequence[GradientRecord] = ()):
        self.run = run
        self.interval = interval
        self.rows = [row for row in rows if row.update < run.progress.updates]
        self.bases = shared_bases(unwrap_model(run.task.trained))
        run.task.register_forward_hook(self.record)

    def record(self, task: Any, args: tuple, parts: dict[str, torch.Tensor]) -> None:
        """Forward hook of a timm task."""
        accelerator, update = self.run.accelerator, self.run.progress.updates
        if update % self.interval or not accelerator.sync_gradients:
            return
        gradients = torch.autograd.grad(parts['loss'], list(self.bases.values()), retain_graph=True)
        done = (self.run.progress.epoch + self.run.progress.batch / len(self.run.train_loader))
        for (name, basis), gradient in zip(self.bases.items(), gradients):
            size = accelerator.reduce(gradient.float(), 'mean').abs()
            norm = basis.detach().float().flatten(1).norm(dim=1).mean()
            self.rows.append(GradientRecord(
                self.run.folder.name, update, done, name, size.mean().item(), size.max().item(), norm.item()))

    def after_epoch(self, run: Run) -> None:
        """Write what was recorded so far."""
        if run.accelerator.is_main_process:
            write_table(run.folder / ROWS, [row._asdict() for row in self.rows])


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal gradflow``; returns the exit code.

    Raises:
        UserError: A model without shared filters, and anything else that a user can mend; one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    output = gradflow(parse_config(argv, GradflowConfig, 'timm-spinal gradflow', __doc__))
    if PartialState().is_main_process:
        print(f'\n{(output / "report.md").read_text(encoding="utf-8")}\npictures: {output / "gradients.png"}, '
              f'{output / "gram.png"}')
    return 0


def gradflow(config: GradflowConfig) -> Path:
    """Train both arms and write the report; returns its folder.

    Args:
        config: As ``timm-spinal gradflow`` takes it.

    Raises:
        UserError: Anything a user can mend; one line.
    """
    for flag, reason in (
        ('torchcompile', 'a compiled model gives its gradient once'),
        ('grad_checkpointing', 'each gradient would compute the activations again and count them in BatchNorms once '
                               'more'),
    ):
        if getattr(config, flag):
            raise UserError(f'{to_flag(flag)}: {reason}, but gradflow computes it twice; leave this option out')
    if config.experiment:
        check_name(config.experiment, '--experiment')
    config = replace(config, sb_ortho=config.sb_ortho or 10.)
    output = Path(config.output or 'output/gradflow') / (config.experiment or safe_model_name(config.model))
    # the penalty first: it refuses a model without shared filters before anything is trained
    rows = {arm: train_arm(config, output, arm) for arm in reversed(ARMS)}
    if PartialState().is_main_process:
        write_gradients(output, [row for arm in ARMS for row in rows[arm]], config)
        draw_gram(output / 'gram.png', {arm.replace('_', ' '): read_model(output / arm) for arm in ARMS})
    PartialState().wait_for_everyone()
    return output


def train_arm(config: GradflowConfig, output: Path, arm: str) -> list[GradientRecord]:
    """Train with or without the penalty in ``output/arm``, unless that is done; returns what was recorded.

    Args:
        config: As ``timm-spinal gradflow`` takes it.
        output: Folder of both arms.
        arm: One of `ARMS`.
    """
    folder = output / arm
    if config.resume and (folder / RESULT).exists():
        return read_records(folder / ROWS)
    values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    own = TrainConfig(**{
        **values, 'output': str(output), 'experiment': arm, 'resume': 'auto' if config.resume else '',
        'sb_ortho': config.sb_ortho if ARMS[arm] else 0.})
    with open_run(own) as run:
        watch = GradientWatch(run, config.grad_interval, read_records(folder / ROWS) if config.resume else ())
        train_epochs(run, watch.after_epoch)
        write_result(run)
    return watch.rows


if __name__ == '__main__':
    from timm_spinal.cli import guard
    sys.exit(guard(main, sys.argv[1:]))
