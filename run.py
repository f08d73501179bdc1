"""Searches for an architecture by DARTS: python run.py [--dataset cifar10 ...]; -h lists the options."""

import sys

from darts_fast import SearchConfig, resume_search, search
from darts_fast.config import argument_parser
from darts_fast.errors import InputError
from darts_fast.runs import run_program


def main() -> None:
    parser = argument_parser(SearchConfig, __doc__)
    parser.add_argument("--resume", metavar="DIR", help="go on with the search of this run folder")
    given = vars(parser.parse_args())
    directory = given.pop("resume")
    if directory is None:
        search(SearchConfig(**given))
    elif given:
        raise InputError(
            f"--resume takes its settings from {directory}/config.json; leave out --{next(iter(given))}"
        )
    else:
        resume_search(directory)


if __name__ == "__main__":
    sys.exit(run_program("run.py", main))
