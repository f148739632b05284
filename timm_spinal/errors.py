"""What the command line shows in one line, without a traceback."""
import contextlib
import logging
import re
import signal
import traceback
import warnings
from typing import Callable, Iterator


class UserError(ValueError):
    """Bad input from the user: one line that names the thing, the reason and the fix.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


class StopRequested(Exception):
    """A run ended on a signal, after its checkpoint was written.

    Args:
        signum: The signal; the process should exit with 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(f'stopped by {signal.Signals(signum).name}')
        self.signum = signum


@contextlib.contextmanager
def dead_workers_named(advice: Callable[[], str]) -> Iterator[None]:
    """One line in place of torch's error about a loader worker that was killed.

    Args:
        advice: What to do next, asked for when it happens.

    Raises:
        UserError: Names the worker, the likely reason and what to do.
    """
    try:
        yield
    except (ConnectionResetError, EOFError) as e:  # the worker died while a batch of it was fetched
        if not any(frame.name == 'rebuild_storage_fd' for frame in traceback.extract_tb(e.__traceback__)):
            raise
        lost = UserError(f'a loader worker was killed: most likely the machine is out of memory; use fewer --workers '
                         f'or a smaller --batch-size, then {advice()}')
        lost.local = True  # type: ignore[attr-defined]
        raise lost from e
    except RuntimeError as e:
        match = re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]*)', str(e))
        if match is None:
            raise
        process, what = match[1], ' '.join(match[2].split())
        memory = 'shared memory (/dev/shm)' if 'Bus error' in what else 'memory'
        error = UserError(f'loader worker {process} {what}: most likely the machine is out of {memory}; use fewer '
                          f'--workers or a smaller --batch-size, then {advice()}')
        error.local = True  # type: ignore[attr-defined]
        raise error from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and log messages: of deprecated layers, of models without weights, of exporters."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)
