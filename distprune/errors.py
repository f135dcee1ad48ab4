"""What a user sees when something is wrong."""


class InputError(ValueError):
    """Bad input: a file, tensor or option that the user can mend.

    The message names the thing and the mend, in one or two sentences. The command line prints it alone,
    without a traceback, and exits with status 2.
    """
