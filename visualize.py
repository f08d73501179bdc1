"""Draws both cells of a genotype in one picture: python visualize.py DARTS_V2; -h lists the options."""

import sys

from darts_fast.cli import draw as main
from darts_fast.runs import run_program

if __name__ == "__main__":
    sys.exit(run_program("visualize.py", main))
