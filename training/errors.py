"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in the input, told in one line that names the value and the fix.

    `training/stage.py` prints the message alone, without a traceback, and exits with status 2.
    """
