"""Searches for an architecture by DARTS: python run.py [--dataset cifar10 ...]; -h lists the options."""

import sys

from darts_fast import SearchConfig, resume_search, search
from darts_fast.config import argument_parser, refuse_settings
from darts_fast.runs import run_program


def main() -> None:
    parser = argument_parser(SearchConfig, __doc__)
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with the search of this run folder, on --device if given"
    )
    given = vars(parser.parse_args())
    resumed = given.pop("resume")
    if resumed is not None:
        device = given.pop("device", None)
        refuse_settings("--resume", resumed, given)
        resume_search(resumed, device=device)
    else:
        search(SearchConfig(**given))


if __name__ == "__main__":
    sys.exit(run_program("run.py", main))
