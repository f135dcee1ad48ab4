"""What a user is told when something is wrong."""


class InputError(ValueError):
    """Bad input: a file, tensor or option that the user can fix.

    The message names the thing and the fix, in one or two sentences. The command line prints it alone,
    without a traceback, and exits with status 2.
    """


class RunFailed(RuntimeError):
    """A run can't go on, for a reason that lies outside its input. What it has done is kept.

    The message names the reason and the fix, in one or two sentences. The command line prints it alone, without a
    traceback, and exits with status 1.
    """


class GateFailed(RunFailed):
    """No result of a pipeline is as good as its gate asks; nothing was published. ``summary`` is the pipeline's.

    The command line exits with status 3.
    """

    def __init__(self, message: str, summary: object):
        super().__init__(message)
        self.summary = summary


class WorkersLost(RunFailed):
    """A task lost worker after worker: with fewer workers the same run may go on."""


class StorageFailed(RunFailed):
    """A file system or the object store is full, or broken: when there is room again, the same run goes on."""


class Unreachable(InputError):
    """Weights can't be read, which may pass. What the run has done is kept: once they can be, it may go on."""


class InterruptedWhenDone(KeyboardInterrupt):
    """A signal came when a run's result was already there. ``record`` is the run's."""

    def __init__(self, record: object):
        super().__init__("interrupted, with the result already published")
        self.record = record


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance; what it gave is used, and the run's record tells."""
