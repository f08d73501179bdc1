"""The program `darts-fast`, a command each for what the package does. The scripts run.py, run_from.py and
visualize.py of a checkout are the commands `search`, `train` and `draw`.

A command reads `sys.argv`, whose first word is the program's name as a person types it.
"""

import argparse
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from importlib.metadata import version

from darts_fast.config import (
    Config,
    OneSentenceParser,
    SearchConfig,
    TrainConfig,
    argument_parser,
    refuse_settings,
)
from darts_fast.distributed import refuse_ranks
from darts_fast.errors import InputError, one_line, say
from darts_fast.export import main as export
from darts_fast.notation import NAMED, load_titled
from darts_fast.plot import FORMATS, picture_path, save
from darts_fast.protocol import main as protocol
from darts_fast.runs import run_program
from darts_fast.search import resume_search
from darts_fast.search import search as run_search
from darts_fast.train import evaluate as evaluate_networks
from darts_fast.train import resume_training
from darts_fast.train import train as run_training


def search() -> None:
    given = vars(_run_parser(SearchConfig, "Searches for an architecture by DARTS.").parse_args())
    resumed = given.pop("resume")
    if resumed is None:
        run_search(SearchConfig(**given))
    else:
        device = given.pop("device", None)
        refuse_settings("--resume", resumed, given)
        resume_search(resumed, device=device)


def train() -> None:
    parser = _run_parser(TrainConfig, "Trains a genotype and tests it.")
    parser.add_argument(
        "--evaluate", metavar="DIR", help="test the networks saved in this run folder again, on --device"
    )
    parser.add_argument(
        "--recipe",
        choices=TrainConfig.RECIPES,
        default=argparse.SUPPRESS,
        help="published settings of a whole training, but for what is given beside it: "
        + "; ".join(f"{name}: {_in_words(values)}" for name, values in TrainConfig.RECIPES.items()),
    )
    given = vars(parser.parse_args())
    resumed, evaluated = given.pop("resume"), given.pop("evaluate")
    if evaluated is not None:
        device = given.pop("device", None)
        refuse_settings("--evaluate", evaluated, given | ({"resume": resumed} if resumed else {}))
        _evaluate(evaluated, device)
    elif resumed is not None:
        device = given.pop("device", None)
        refuse_settings("--resume", resumed, given)
        resume_training(resumed, device=device)
    elif "recipe" in given:
        run_training(TrainConfig.of_recipe(**given))
    else:
        run_training(TrainConfig(**given))


def evaluate() -> None:
    parser = OneSentenceParser(
        description="Tests the networks saved by a training again, on its test images.", allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", help="the run folder of the training")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    given = parser.parse_args()
    _evaluate(given.folder, given.device)


def draw() -> None:
    parser = OneSentenceParser(
        description="Draws both cells of a genotype in one picture.", allow_abbrev=False
    )
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


def profile() -> None:
    """Without `search` or `train` after it; see `main`."""
    if sys.argv[1:] not in (["-h"], ["--help"]):
        raise InputError("what is profiled is a search or a training: darts-fast profile search, or train")
    say(
        "usage: darts-fast profile search [SETTINGS]\n"
        "       darts-fast profile train [SETTINGS]\n\n"
        "The same as darts-fast search --profile and darts-fast train --profile."
    )


# The commands, with what each does. Another one is a line here: a function that reads `sys.argv`.
COMMANDS: dict[str, tuple[Callable[[], None], str]] = {
    "search": (search, "search for an architecture"),
    "train": (train, "train a genotype and test it"),
    "evaluate": (evaluate, "test the networks of a training again"),
    "draw": (draw, "draw the cells of a genotype"),
    "export": (export, "a trained network as a file of torch.export, ONNX or safetensors"),
    "protocol": (protocol, "search, choose and train cells as the paper, random ones beside"),
    "profile": (profile, "`profile search`, `profile train`: report what bounds the run"),
}


def main() -> int:
    """`darts-fast COMMAND ...`; returns the exit code."""
    words = sys.argv[1:]
    if words[:2] in (["profile", "search"], ["profile", "train"]):
        words = [words[1], "--profile", *words[2:]]
    if words and words[0] in COMMANDS:
        sys.argv = [f"darts-fast {words[0]}", *words[1:]]
        return run_program(sys.argv[0], COMMANDS[words[0]][0])
    return run_program("darts-fast", lambda: _without_command(words))


def _without_command(words: list[str]) -> None:
    commands = "\n".join(f"  {name:<10}{meaning}" for name, (_, meaning) in COMMANDS.items())
    if words in (["-h"], ["--help"]):
        say(
            "usage: darts-fast COMMAND ...\n\n"
            "Differentiable architecture search (DARTS), fast and exact.\n\n"
            f"{commands}\n\n"
            "  -h        this text; after a command, its settings: darts-fast search -h\n"
            "  --version the version\n\n"
            "A first search, which needs no data: darts-fast search --fused --amp"
        )
    elif words == ["--version"]:
        say(f"darts-fast {version('darts_fast')}")
    else:
        known = ", ".join(COMMANDS)
        found = f"no command {words[0]!r}" if words else "a command is missing"
        raise InputError(f"{found}; there are {known} (-h says what they do)")


def _run_parser(config: type[Config], description: str) -> ArgumentParser:
    parser = argument_parser(config, description)
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help=f"go on with the {config.WORD} of this run folder, on --device if given",
    )
    return parser


def _in_words(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _evaluate(folder: str, device: str | None) -> None:
    refuse_ranks("trained networks are tested")
    for name, (loss, top1, top5) in evaluate_networks(folder, device).items():
        say(one_line(f"{folder}/{name}: test loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}"))
