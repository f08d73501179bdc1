"""Searches for an architecture by DARTS: python run.py [--dataset cifar10 ...]; -h lists the options."""

import sys

from darts_fast.cli import search as main
from darts_fast.runs import run_program

if __name__ == "__main__":
    sys.exit(run_program("run.py", main))
