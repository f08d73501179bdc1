"""The two exceptions that a person is meant to read: each message is one sentence."""


class InputError(ValueError):
    """Bad input: settings, data files, a full or read-only disk. Says what is wrong and what would be right.

    The programs print it and exit with 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on, as when its loss is no longer finite. The programs exit with 1."""


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for a sentence."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
