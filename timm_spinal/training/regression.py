"""Training on numbers: vectors in, one number out, mean squared or absolute error.

``--dataset regression/sum`` and its like are the data of SpinalNet's regression script (docs/papers/spinalnet.md,
section 3.5); ``--dataset regression --data-dir FILE.csv`` reads a table of numbers whose last column is the target.
Models take vectors as images of one pixel, (N, F, 1, 1), as ``spinal_regression`` does.
"""
import csv
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.models import safe_model_name
from timm.utils import unwrap_model
from torch.utils.data import DataLoader, Dataset

from timm_spinal.errors import UserError

from .classification import Classification
from .config import TrainConfig
from .data import TrainData, create_loader, create_sampler
from .dataset import EvalSampler
from .distributed import used_precision
from .model import check_model_name, create_model
from .optim import apply_freeze
from .report import how_to_load
from .results import common_result, environment, export_model
from .run import Problem, Run
from .task import Task, build_penalties

PREFIX = 'regression'
LOSSES: dict[str, type[nn.Module]] = {'mse': nn.MSELoss, 'l1': nn.L1Loss}
INPUTS = 8
NOISE = 0.2  # width of the uniform noise on the targets, as in the script; its variance is NOISE ** 2 / 12
SIZES = dict(train=1_000, validation=1_000, test=10_000)
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'sum': lambda x: x.sum(1),
    'sin_sum': lambda x: x.sum(1).sin(),
    'product': lambda x: x.prod(1),
    'sin_product': lambda x: x.prod(1).sin(),
}
# options of images with classes, which numbers do not have
_OF_CLASSES = ('mixup', 'cutmix', 'cutmix_minmax', 'kd_model_name', 'aug_repeats', 'bce_loss', 'freeze_epochs')


def is_regression(config: Any) -> bool:
    """Whether a config trains on numbers."""
    return config.dataset.partition('/')[0] == PREFIX or config.loss in LOSSES


def problem_of(config: Any) -> type[Problem]:
    """What a config of the trainer trains: images with classes, or numbers."""
    return Regression if is_regression(config) else Classification


def synthetic(function: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (N, 8) from N(0, 1) and targets (N, 1), a function of them plus uniform noise in [0, 0.2).

    The same in every run: seeds of runs decide on weights and order alone.

    Args:
        function: A key of `FUNCTIONS`.
        split: A key of `SIZES`.
    """
    generator = torch.Generator().manual_seed(list(SIZES).index(split))
    x = torch.randn(SIZES[split], INPUTS, generator=generator)
    y = FUNCTIONS[function](x) + NOISE * torch.rand(len(x), generator=generator)
    return x, y[:, None]


def read_table(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (N, F) and targets (N, 1) of a table with a line of titles; the last column is the target.

    Raises:
        UserError: No such file, a table without numbers, or a cell that is no finite number; names its line.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            lines = list(csv.reader(file))[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f'--data-dir {path}: cannot be read as a table ({e}); give a CSV file') from e
    rows: list[list[float]] = []
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        try:
            row = [float(cell) for cell in cells]
        except ValueError as e:
            raise UserError(f'--data-dir {path}: line {number} holds what is no number ({e}); mend or remove it') from e
        if not all(map(math.isfinite, row)):
            raise UserError(f'--data-dir {path}: line {number} holds NaN or an infinite number; mend or remove it')
        if rows and len(row) != len(rows[0]):
            raise UserError(f'--data-dir {path}: line {number} has {len(row)} cells, the others {len(rows[0])}; '
                            'mend it')
        rows.append(row)
    if len(rows) < 4 or len(rows[0]) < 2:
        raise UserError(f'--data-dir {path}: has {len(rows)} lines of numbers; give at least 4, with an input and a '
                        'target each, below a line of titles')
    table = torch.tensor(rows)
    return table[:, :-1], table[:, -1:]


def open_numbers(config: TrainConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of the splits ``train`` and ``eval``, and ``test`` where --test-split names one.

    Raises:
        UserError: An unknown function, or a table that cannot be used.
    """
    function = config.dataset.partition('/')[2]
    if function in FUNCTIONS:
        splits = dict(train=synthetic(function, 'train'), eval=synthetic(function, 'validation'))
        return dict(splits, test=synthetic(function, 'test')) if config.test_split else splits
    if function or config.dataset != PREFIX or not config.data_dir:
        names = ', '.join(f'{PREFIX}/{name}' for name in FUNCTIONS)
        given = f'--dataset {config.dataset}' if config.dataset else f'--loss {config.loss} is for numbers'
        raise UserError(f'{given}: no such data; use --dataset {names}, or --dataset {PREFIX} --data-dir FILE.csv')
    if config.test_split:
        raise UserError(f'--test-split {config.test_split}: a table of numbers is cut into training and validation '
                        'only; leave it out')
    x, y = read_table(Path(config.data_dir))
    order = torch.from_numpy(np.random.default_rng(config.seed).permutation(len(x)))
    held = min(max(1, round((config.val_split_fraction or 0.2) * len(x))), len(x) - 2)
    return dict(train=(x[order[held:]], y[order[held:]]), eval=(x[order[:held]], y[order[:held]]))


class Numbers(Dataset):
    """Vectors as images of one pixel, (F, 1, 1), with their targets (1,); the samplers' seeds are not needed."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y = x[:, :, None, None], y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[item[0]], self.y[item[0]]


class RegressionTask(Task):
    """Distance of outputs (B, 1) and targets (B, 1), mean over the batch."""

    def __init__(self, model: nn.Module, loss: str, device: torch.device):
        super().__init__(device=device, verbose=False)
        self.trainable_module = model
        self.criterion = LOSSES[loss]()

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        output = self.trainable_module(x)
        return dict(loss=self.criterion(output.float(), target), output=output)


class Regression(Problem[TrainConfig]):
    """Vectors and a number for each.

    Raises:
        UserError: Data that cannot be used, or options that numbers do not have.
    """
    metrics = ('loss', 'mse', 'r2')

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        check_model_name(config.model)
        for name in _OF_CLASSES:
            if getattr(config, name):
                raise UserError(f'--{name.replace("_", "-")}: is for images with classes, not for --dataset '
                                f'{config.dataset}; leave it out')
        self.loss = config.loss or 'mse'
        if self.loss not in LOSSES:
            raise UserError(f'--loss {self.loss}: is for classes, not for --dataset {config.dataset}; use mse or l1')
        if config.eval_metric not in ('top1', *self.metrics):
            raise UserError(f'--eval-metric {config.eval_metric}: is not measured for numbers; use '
                            f'{", ".join(self.metrics)}')
        self.splits = open_numbers(config)
        self.metric = 'r2' if config.eval_metric == 'top1' else config.eval_metric
        self.config = replace(config, num_classes=1, mixed_precision=used_precision(config, accelerator))
        sizes = ', '.join(f'{name} {len(x)}' for name, (x, _) in self.splits.items())
        accelerator.print(f'{config.dataset}: {self.splits["train"][0].shape[1]} inputs; {sizes}', flush=True)

    def build_model(self, config: TrainConfig) -> Any:
        return create_model(replace(config, in_chans=self.splits['train'][0].shape[1]), 1)

    def without_weights(self) -> dict[str, Any]:
        return dict(pretrained=False, pretrained_path=None, initial_checkpoint='')

    def create_data(self, model: Any, accelerator: Accelerator) -> None:
        config, splits = self.config, self.splits
        inputs = splits['train'][0].shape[1]
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, inputs, 1, 1))
        except RuntimeError as e:
            raise UserError(f'--model {config.model}: takes no vectors of {inputs} numbers '
                            f'({str(e).splitlines()[0]}); use spinal_regression or spinal_regression_plain') from e
        sampler = create_sampler(
            config, len(splits['train'][0]), config.seed, accelerator.num_processes,
            accelerator.gradient_accumulation_steps)

        def evaluation(split: str) -> DataLoader:
            data, batch = Numbers(*splits[split]), config.validation_batch_size or config.batch_size
            return create_loader(config, data, EvalSampler(len(data)), batch)

        self.data = TrainData(
            train_loader=create_loader(config, Numbers(*splits['train']), sampler, config.batch_size, drop_last=True),
            eval_loader=evaluation('eval'),
            test_loader=evaluation('test') if 'test' in splits else None,
            mixup=None,
            num_classes=1,
            class_names=None,
            data_config=dict(input_size=(inputs, 1, 1), mean=(0.,), std=(1.,)),
            train_size=len(splits['train'][0]),
            eval_size=len(splits['eval'][0]),
            test_size=len(splits['test'][0]) if 'test' in splits else 0,
        )
        self.name = f'{safe_model_name(config.model)}-{config.dataset.replace("/", "-")}'

    def create_task(self, model: Any, accelerator: Accelerator, resuming: bool) -> Task:
        apply_freeze(model, self.config.freeze, self.config.freeze_modules)
        task = RegressionTask(model, self.loss, accelerator.device)
        task.penalties = build_penalties(self.config, model)
        return task

    @torch.no_grad()
    def evaluate(self, run: Run[TrainConfig], model: nn.Module, loader: DataLoader, split: str) -> dict[str, Any]:
        """``loss``, ``mse``, and ``r2``, the part of the targets' variance that is explained, in percent."""
        start = time.perf_counter()
        model.eval()
        pairs = []
        for x, target in loader:
            pairs.append(torch.cat(run.accelerator.gather_for_metrics((model(x).float(), target)), dim=1))
        output, target = torch.cat(pairs).double().unbind(1)
        mse = (output - target).square().mean()
        r2 = 100. * (1. - mse / target.var(correction=0))
        return dict(
            loss=float(LOSSES[self.loss]()(output, target)),
            mse=float(mse),
            r2=float(r2),
            images=len(output),
            nonfinite=int((~output.isfinite()).sum()),
            seconds=time.perf_counter() - start,
        )

    def save_best(
            self,
            folder: Path,
            model: Any,
            state_dict: dict[str, torch.Tensor],
            metrics: dict[str, Any],
    ) -> None:
        export_model(folder, model, state_dict, None, self.data.data_config)

    def result(self, run: Run[TrainConfig]) -> dict[str, Any]:
        """``result.json``: errors and explained variance of the best epoch, counts, speed, origin."""
        model = unwrap_model(run.task.evaluated())
        return dict(
            model=self.config.model,
            **common_result(run),
            dataset=self.config.dataset,
            inputs=model.in_chans,
            **environment(run),
        )

    def how_to_load(self, run: Run[TrainConfig]) -> str:
        return how_to_load(run.folder)
