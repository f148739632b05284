"""The one error that the command line shows without a traceback."""


class UserError(ValueError):
    """Bad input from the user: one line that names the thing, the reason and the fix.

    The command line prints it as ``error: ...`` and exits with code 2.
    """
