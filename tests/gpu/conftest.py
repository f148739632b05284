"""Checks on a CUDA device: ``pytest -m gpu tests/gpu``, ten minutes on one H100; each file by itself is a part of them.

``TIMM_SPINAL_GPU_TESTS_DEVICE=cpu`` runs on the CPU what can run there, to see that the tests themselves are right.
``TIMM_SPINAL_GPU_TESTS_CSV=FILE`` gets a row for each figure that is measured.
"""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

DEVICE = os.environ.get('TIMM_SPINAL_GPU_TESTS_DEVICE', 'cuda')
CARD = torch.cuda.get_device_name() if DEVICE == 'cuda' and torch.cuda.is_available() else 'CPU'
AMP_DTYPES = (torch.bfloat16, torch.float16)
ENTRY = """
import sys
from timm_spinal.cli import guard
from timm_spinal.train import run
sys.exit(guard(run, sys.argv[1:]))
"""
REASON = 'needs a CUDA device, or TIMM_SPINAL_GPU_TESTS_DEVICE=cpu'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker('gpu')
            if DEVICE == 'cuda' and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device():
    """The device, computing in whole float32 as the CPU does."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(DEVICE)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    if DEVICE == 'cuda':
        torch.cuda.empty_cache()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Greatest difference, as a part of the greatest value of b; NaN where a has one."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> Path:
    """160 training and 40 validation images of four classes, which differ in brightness."""
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 160), ('validation', 40)):
        for i in range(count):
            path = folder / split / f'c{i % 4}' / f'{i:05d}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal(80 + 30 * (i % 4), 40, (40, 40, 3)).clip(0, 255).astype('uint8')
            Image.fromarray(pixels).save(path)
    return folder


class Trainings:
    """Trainings in processes of their own, for a fresh Accelerate and deterministic algorithms in some of them.

    Args:
        images: Data set.
        output: Folder of the runs.
    """

    def __init__(self, images: Path, output: Path):
        self.images = images
        self.output = output

    def __call__(
            self,
            name: str,
            *options: Any,
            before: str = '',
            launcher: tuple[str, ...] = (),
            code: int = 0,
            said: str = '',
    ) -> dict[str, Any]:
        """Train 32-pixel images in batches of 16, 10 updates an epoch.

        Args:
            name: Of the run.
            options: Of ``timm-spinal train``.
            before: Lines of Python that the process begins with.
            launcher: Arguments of Python that start a launcher; without any a plain process.
            code: The exit code that the process must have.
            said: A line that it must print.

        Returns:
            ``result.json``; empty where the run was stopped before.
        """
        script = self.output / f'{name}.py'
        script.write_text(f'{before}\n{ENTRY}')
        options = (
            '--data-dir', self.images, '--img-size', 32, '--batch-size', 16, '--warmup-epochs', 0, '--lr', 0.01,
            '--workers', 0, '--log-interval', 1000, '--debug', '--output', self.output, '--experiment', name, *options)
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]), CUBLAS_WORKSPACE_CONFIG=':4096:8')
        if DEVICE == 'cpu':
            environment['ACCELERATE_USE_CPU'] = 'true'
        command = [sys.executable, *launcher, str(script), *map(str, options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, f'{name}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}'
        assert said in done.stdout + done.stderr, done.stdout + done.stderr
        result = self.output / name / 'result.json'
        return json.loads(result.read_text()) if result.exists() else {}


@pytest.fixture
def record():
    """``record(row, what, measure, value, unit, setting)``: keep a figure with the card and torch that gave it."""
    def write(row: str, what: str, measure: str, value: float, unit: str, setting: str) -> None:
        print(f'{what}, {measure}: {value:.4g} {unit} ({setting})')
        if not (name := os.environ.get('TIMM_SPINAL_GPU_TESTS_CSV')):
            return
        cells = dict(row=row, what=what, measure=measure, value=f'{value:.4g}', unit=unit, setting=setting, card=CARD,
                     torch=torch.__version__)
        new = not Path(name).exists()
        with open(name, 'a', newline='') as f:
            table = csv.DictWriter(f, list(cells))
            if new:
                table.writeheader()
            table.writerow(cells)
    return write


@pytest.fixture
def training(images, tmp_path):
    return Trainings(images, tmp_path)
