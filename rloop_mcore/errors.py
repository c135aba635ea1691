"""The exceptions that end a command with one sentence instead of a traceback."""


class UserError(Exception):
    """A user's mistake: printed as one sentence without a traceback, exit code 2.

    The message says what is wrong, where (file, key, value) and what would be right.
    """


class Fault(RuntimeError):
    """Something outside the program failed, and the message says what: printed as it is, exit code 1."""


class DiskFull(Fault):
    """There is no space for what has to be written; it can be tried again."""


class Interrupted(Exception):
    """The run was asked to stop, and goes on from its last commit. A message: where that is not what it was doing."""
