"""What a person is meant to read: two exceptions, each message one sentence in one line, and output."""

import os
import sys


def one_line(text: str) -> str:
    """The text with whatever would break the line or steer a terminal (a line break, an escape sequence in a
    file's name) written as in Python: "\\n"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """Bad input: settings, data files, a full or read-only disk. Says what is wrong and what would be right.

    The programs print it and exit with 2.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class DamagedImage(InputError):
    """A file that cannot be read as an image. Where it is found in the middle of a run, the run is saved."""


class RunError(RuntimeError):
    """A run that cannot go on, as when its loss is no longer finite. The programs exit with 1."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for a sentence."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def say(text: str) -> None:
    """Prints what the program was asked for.

    Raises:
        RunError: it cannot be written, as when the disk is full or `| head` has gone.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python shall not try again at exit
        raise RunError(f"cannot write to the standard output: {error.strerror}") from error
