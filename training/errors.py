"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in the input, told in one line that names the value and the fix.

    `training/stage.py` prints the message alone, without a traceback, and exits with status 2.
    """


class Preempted(Exception):
    """The run was told to stop (SIGTERM), and what it had learnt is on disk.

    `training/stage.py` exits with status 0.
    """
