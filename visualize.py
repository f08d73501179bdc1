"""Draws both cells of a genotype in one picture: python visualize.py DARTS_V2; -h lists the options."""

import sys

from darts_fast.config import OneSentenceParser
from darts_fast.errors import say
from darts_fast.notation import NAMED, load_titled
from darts_fast.plot import FORMATS, picture_path, save
from darts_fast.runs import run_program


def main() -> None:
    parser = OneSentenceParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "genotype",
        metavar="GENOTYPE",
        help="written out, the folder of a search, a .json, a log, or the name of a published one: "
        + ", ".join(NAMED),
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write, replaced if it exists (default: the genotype's name in this folder, "
        "which is never replaced)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help=f"(default: that of --out's suffix, else {FORMATS[0]})"
    )
    given = parser.parse_args()
    title, genotype = load_titled(given.genotype)
    path = picture_path(title, given.out, given.format)
    save(genotype, path, title)
    say(f"wrote {str(path)!r}")


if __name__ == "__main__":
    sys.exit(run_program("visualize.py", main))
