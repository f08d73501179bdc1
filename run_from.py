"""Trains a genotype: python run_from.py --genotype DARTS_V2 [--dataset cifar10 ...]; -h lists the options."""

import sys

from darts_fast.cli import train as main
from darts_fast.runs import run_program

if __name__ == "__main__":
    sys.exit(run_program("run_from.py", main))
