"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A user's mistake: printed as one sentence without a traceback, exit code 2.

    The message says what is wrong, where (file, key, value) and what would be right.
    """
