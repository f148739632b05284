"""What every test needs: no network, one thread, and a way to start several processes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture
def launch():
    """``launch(processes, *arguments)``: `accelerate launch` on the CPU; returns the completed process."""
    def start(processes: int, *arguments: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
        done = subprocess.run(launch_command(processes, *arguments), env=launch_env(), text=True,
                              capture_output=True, timeout=200, **kwargs)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    return start


def launch_command(processes: int, *arguments: str) -> list[str]:
    several = ('--multi_gpu', '--num_processes', str(processes), '--num_machines', '1', '--main_process_port', '0')
    return [sys.executable, '-m', 'accelerate.commands.launch', *(several if processes > 1 else ()), *arguments]


def launch_env() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return dict(os.environ, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONPATH=root)
