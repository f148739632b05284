"""What the command line shows in one line, without a traceback."""
import signal


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
