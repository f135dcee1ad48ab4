"""What a user is told when something is wrong."""


class InputError(ValueError):
    """Bad input: a file, tensor or option that the user can mend.

    The message names the thing and the mend, in one or two sentences. The command line prints it alone,
    without a traceback, and exits with status 2.
    """


class WorkersLost(InputError):
    """A task lost worker after worker. What the run has done is kept: with fewer workers the same run may go on."""


class Unreachable(InputError):
    """Weights can't be read, which may pass. What the run has done is kept: once they can be, it may go on."""


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance; what it gave is used, and the run's record tells."""
