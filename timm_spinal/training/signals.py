"""Ctrl-C and SIGTERM as a flag that the loop looks at."""
import os
import signal
from pathlib import Path
from types import FrameType


class StopRequested(Exception):
    """A run ended on a signal, after its checkpoint was written.

    Args:
        signum: The signal; the process should exit with 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(f'stopped by {signal.Signals(signum).name}')
        self.signum = signum


class SignalFlag:
    """Context in which SIGINT and SIGTERM only set `signum`; the handlers before it come back at its end.

    A launcher may repeat the signal, so later ones are ignored. `accelerate launch` of a single process does not pass
    SIGTERM on: that it is gone counts as SIGTERM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._signum = 0
        self._launcher = _launcher()
        self._before: dict[int, object] = {}

    @property
    def signum(self) -> int:
        """The first signal that came, or 0."""
        if not self._signum and self._launcher and os.getppid() != self._launcher:
            self._signum = signal.SIGTERM
        return self._signum

    def __enter__(self) -> 'SignalFlag':
        try:
            self._before = {s: signal.signal(s, self._set) for s in self.SIGNALS}
        except ValueError:  # not the main thread: signals stay with whoever called us
            self._before = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self._signum = self._signum or signum


def _launcher() -> int:
    """Process id of the `accelerate launch` that started this process; 0 when there is none or it is not known."""
    try:
        command = Path(f'/proc/{os.getppid()}/cmdline').read_bytes().split(b'\0')
    except OSError:
        return 0
    return os.getppid() if any(b'accelerate' in part for part in command[:3]) else 0
