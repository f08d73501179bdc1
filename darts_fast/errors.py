"""The one exception that means: the user's input, files or disk are at fault, not the program."""


class InputError(ValueError):
    """Bad input. Its message is one sentence that says what is wrong and what would be right.

    The programs print it and exit with 2; library users may catch it.
    """
