"""What every test needs: no network, one thread, a way to start several processes, and the test Hub's address."""
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .hub.server import TestHub

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')
# huggingface_hub reads these once, when it is imported; only tests/hub goes online, to a Hub in this process
THE_HUB = TestHub()
os.environ['HF_ENDPOINT'] = THE_HUB.url
os.environ['HF_HOME'] = os.environ['HF_HUB_CACHE'] = os.path.join(tempfile.gettempdir(), 'timm_spinal_no_such_cache')
os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'
_cache = tempfile.TemporaryDirectory(prefix='timm_spinal_cache')  # not the user's; removed at the end
os.environ['TIMM_SPINAL_CACHE'] = _cache.name


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what the imports made out of garbage collections; every run asks for some as it ends."""
    gc.collect()
    gc.freeze()


def forget_accelerate() -> None:
    """Let this process choose its precision anew; Accelerate keeps that of the first `Accelerator`."""
    if state := sys.modules.get('accelerate.state'):
        state.AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """A test begins as a process does."""
    yield
    forget_accelerate()


@pytest.fixture
def launch():
    """``launch(processes, *arguments)``: `accelerate launch` on the CPU; returns the completed process."""
    def start(
            processes: int,
            *arguments: str,
            kind: tuple[str, ...] = ('--multi_gpu',),
            check: bool = True,
            **kwargs,
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(launch_command(processes, *arguments, kind=kind), env=launch_env(), text=True,
                              capture_output=True, timeout=200, **kwargs)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    return start


def launch_command(processes: int, *arguments: str, kind: tuple[str, ...] = ('--multi_gpu',)) -> list[str]:
    several = (*kind, '--num_processes', str(processes), '--num_machines', '1', '--main_process_port', '0')
    return [sys.executable, '-m', 'accelerate.commands.launch', *(several if processes > 1 else ()), *arguments]


def launch_env() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return dict(os.environ, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONPATH=root)
