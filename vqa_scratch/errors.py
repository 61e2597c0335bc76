"""The one exception that programs turn into a single line and exit code 2."""


class UserError(ValueError):
    """Bad input from outside: a file, a flag, a checkpoint. The message says what, where, and what would be right."""
