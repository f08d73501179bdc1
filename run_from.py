"""Trains a genotype: python run_from.py --genotype DARTS_V2 [--dataset cifar10 ...]; -h lists the options."""

import sys

from darts_fast import TrainConfig, evaluate, resume_training, train
from darts_fast.config import argument_parser, refuse_settings
from darts_fast.distributed import refuse_ranks
from darts_fast.errors import one_line, say
from darts_fast.runs import run_program


def main() -> None:
    parser = argument_parser(TrainConfig, __doc__)
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with the training of this run folder, on --device if given"
    )
    parser.add_argument(
        "--evaluate", metavar="DIR", help="test the networks saved in this run folder again, on --device"
    )
    given = vars(parser.parse_args())
    resumed, evaluated = given.pop("resume"), given.pop("evaluate")
    if evaluated is not None:
        refuse_ranks("--evaluate tests")
        device = given.pop("device", None)
        refuse_settings("--evaluate", evaluated, given | ({"resume": resumed} if resumed else {}))
        for name, (loss, top1, top5) in evaluate(evaluated, device).items():
            say(one_line(f"{evaluated}/{name}: test loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}"))
    elif resumed is not None:
        device = given.pop("device", None)
        refuse_settings("--resume", resumed, given)
        resume_training(resumed, device=device)
    else:
        train(TrainConfig(**given))


if __name__ == "__main__":
    sys.exit(run_program("run_from.py", main))
