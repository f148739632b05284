"""Ctrl-C and SIGTERM as a flag that the loop looks at."""
import signal
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

    A launcher may repeat the signal, so later ones are ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, object] = {}

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
        self.signum = self.signum or signum
