"""Trainings in processes of their own, some at a time."""
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from timm_spinal.training.config import TrainConfig
from timm_spinal.training.report import write_text
from timm_spinal.training.run_dir import FolderLock, Occupied

from .runs import ERROR, RESULT
from .sweep_file import write_config


@dataclass(frozen=True)
class Task:
    """One training: its config names its folder. It waits for that of its teacher."""
    variant: str
    config: TrainConfig
    teacher: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.experiment

    @property
    def title(self) -> str:
        return f'{self.variant}, {self.config.experiment}'


def run_tasks(tasks: list[Task], jobs: int) -> int:
    """Run what is not finished, some at a time; a failure is told and the others go on. Returns the failures."""
    todo = [task for task in tasks if not is_finished(task)]
    if len(todo) < len(tasks):
        print(f'{len(tasks) - len(todo)} of {len(tasks)} runs are finished already', flush=True)
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(jobs):
        slots.put(slot)
    running: set[subprocess.Popen] = set()
    pool, failed = ThreadPoolExecutor(jobs), 0
    try:
        futures: dict[Future, Task] = {}
        started: dict[Path, Future] = {}  # a teacher is submitted first, so no student blocks the thread that it needs
        for task in todo:
            before = started.get(task.teacher) if task.teacher else None
            started[task.folder] = pool.submit(_run, task, slots, jobs, running, before)
            futures[started[task.folder]] = task
        for count, future in enumerate(as_completed(futures), 1):
            error, seconds = future.result()
            failed += bool(error)
            print(f'[{count}/{len(todo)}] {futures[future].title}: {error or "done"}, {seconds:.0f} s', flush=True)
    except BaseException:
        # trainings write a checkpoint when they are asked to stop
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True)
    return failed


def is_finished(task: Task) -> bool:
    """Whether a run folder holds a result; `check_folder` has seen that it is of these settings."""
    return (task.folder / RESULT).exists() and not (task.folder / ERROR).exists()


def job_environment(slot: int, jobs: int, devices: int) -> dict[str, str]:
    """Environment of one of several trainings at a time: its share of the cores, and a GPU of its own."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
        if devices > 1 and 'CUDA_VISIBLE_DEVICES' not in environment:
            environment['CUDA_VISIBLE_DEVICES'] = str(slot % devices)
    return environment


def _run(
        task: Task,
        slots: 'queue.Queue[int]',
        jobs: int,
        running: set,
        before: Future | None,
) -> tuple[str, float]:
    """Train in a process of its own once `before` has ended; returns why it failed, or '', and the seconds."""
    if before is not None:
        before.result()
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    start, log = time.perf_counter(), task.folder.with_suffix('.log')
    config_file = task.folder.with_suffix('.yaml')
    write_config(config_file, task.config)
    slot = slots.get()
    try:
        with open(log, 'a', encoding='utf-8') as out:
            process = subprocess.Popen(
                [sys.executable, '-m', 'timm_spinal.train', '--config', str(config_file)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=job_environment(slot, jobs, torch.cuda.device_count()))
            running.add(process)
            code = process.wait()
            running.discard(process)
    finally:
        slots.put(slot)
    error = ''
    if code or not (task.folder / RESULT).exists():
        error = f'failed: {_last_error(log) or f"exit code {code}"} (see {log})'
    _keep_error(task.folder, error)
    return error, time.perf_counter() - start


def _keep_error(folder: Path, error: str) -> None:
    """Write why a run failed into its folder, unless it failed because another process runs there."""
    with suppress(Occupied), FolderLock(folder):
        if error:
            write_text(folder / ERROR, error)
        else:
            (folder / ERROR).unlink(missing_ok=True)


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
    errors = [line.partition('error: ')[2] for line in lines if line.startswith('error: ')]
    return (errors or lines or [''])[-1][:300]
