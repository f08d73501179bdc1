"""`darts-fast` as a person calls it; its commands and the scripts of the checkout are the same programs."""

import json
import os
import re
import shlex
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import SMALL_SPACE
from test_run import BAD as BAD_SEARCHES
from test_run import TINY, call, load_program
from test_train import CHEAP

import darts_fast
from darts_fast import Genotype, cli
from darts_fast.runs import METRICS
from darts_fast.search import Search
from darts_fast.train import Training

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = [
    *("--searches", "1", "--trainings", "1"),
    *(
        "--search_settings",
        f"epochs=1 order=1 init_channels=2 batch_size=480 {shlex.quote(f'space={SMALL_SPACE}')}",
    ),
    *("--brief_settings", "epochs=1 init_channels=2 batch_size=480"),
    *("--train_settings", "epochs=1 init_channels=2 layers=3 batch_size=480"),
]


@pytest.fixture
def run(monkeypatch, capsys, in_tmp):
    """Exit code, stdout and stderr of `darts-fast` with these arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/somewhere/darts-fast", *arguments])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_installed_program_is_this_one():
    (found,) = entry_points(group="console_scripts", name="darts-fast")
    assert found.load() is cli.main


@pytest.mark.parametrize(
    ("script", "command"), [("run", "search"), ("run_from", "train"), ("visualize", "draw")]
)
def test_the_scripts_are_commands(script, command):
    assert load_program(script).main is cli.COMMANDS[command][0]


@pytest.mark.usefixtures("no_heat_maps")
def test_each_command_takes_what_the_one_before_left(run, in_tmp):
    """A search; the training of what it found; its networks tested again; the cells drawn."""
    code, out, err = run("search", *TINY, "--epochs", "1", "--name", "a")
    found = json.loads(Path("searchs/a/genotype.json").read_text())["best"]["genotype"]
    genotype = Genotype.from_json(found)
    assert (code, err) == (0, "") and out.splitlines()[-1] == str(genotype)

    code, out, err = run("train", *CHEAP, "--epochs", "1", "--name", "b", "--genotype", "searchs/a")
    assert (code, err) == (0, "")
    assert json.loads(Path("augments/b/config.json").read_text())["genotype"] == str(genotype)
    lines = map(json.loads, Path("augments/b", METRICS).read_text().splitlines())
    (row,) = (row for row in lines if "test_top1" in row)
    reported = f"top-1 {row['test_top1']:.2%}, top-5 {row['test_top5']:.2%}"
    assert f"Test {reported} after the last epoch" in out.splitlines()[-1]

    tested = f"test loss {row['test_loss']:.4f}, {reported}\n"
    expected = "".join(f"augments/b/{name}: {tested}" for name in ("final.pt", "best.pt"))
    for command in (["evaluate", "augments/b"], ["train", "--evaluate", "augments/b"]):
        assert run(*command, "--device", "cpu") == (0, expected, "")

    assert run("draw", "searchs/a") == (0, "wrote 'a.svg'\n", "")
    drawn = Path("a.svg").read_text()
    for name in {name for node in genotype.normal + genotype.reduce for name, _ in node}:
        assert name in drawn


@pytest.mark.usefixtures("no_heat_maps")
def test_profile_is_a_setting_before_the_command(run, in_tmp):
    arguments = [*TINY, "--epochs", "1", "--batch_size", "100", "--profile", "1", "--name", "a"]
    code, out, err = run("profile", "search", *arguments)
    assert (code, err) == (0, "") and (in_tmp / "searchs" / "a" / "profile" / "report.html").exists()
    code, _, err = run("profile", "train", "--genotype", "nothing")
    assert code == 2 and err.startswith("darts-fast train: 'nothing' is no genotype")


# The last line says how to go on by the same program: its command, and what is stopped at which step.
STOPPED = {
    ("run.py", "searchs"): (Search, 2, ["run", *TINY]),
    ("darts-fast search", "searchs"): (Search, 2, ["search", *TINY]),
    ("run_from.py", "augments"): (Training, 2, ["run_from", *CHEAP, "--epochs", "2"]),
    ("darts-fast train", "augments"): (Training, 2, ["train", *CHEAP, "--epochs", "2"]),
    ("darts-fast protocol", "protocols"): (Search, 2, ["protocol", *PROTOCOL]),
}


# Windows has no SIGTERM that a program can catch: it would end at once, and nothing would be saved.
@pytest.mark.skipif(sys.platform == "win32", reason="stops by SIGTERM, a POSIX signal")
@pytest.mark.usefixtures("no_heat_maps")
@pytest.mark.parametrize(("name", "folder"), STOPPED)
def test_what_was_stopped_says_how_to_go_on(name, folder, run, monkeypatch, capsys, in_tmp, signal_at):
    loop, step, (program, *arguments) = STOPPED[name, folder]
    signal_at(loop, step, signal.SIGTERM)
    arguments += ["--name", "my run"]
    if name.endswith(".py"):
        code, _, err = call(monkeypatch, capsys, *arguments, program=program)
    else:
        code, _, err = run(program, *arguments)
    where = "within searches/found-1" if folder == "protocols" else "after 2 steps"
    command = f"python {name}" if name.endswith(".py") else name
    hint = f"{command} --resume '{folder}/my run'"
    assert (code, err) == (143, f"{name}: stopped and saved {where}; go on with: {hint}\n")
    for log in (in_tmp / folder / "my run").glob("*.log"):  # which is read elsewhere, too
        assert log.read_text().endswith("| stopped and saved after 2 steps\n")
    if name.startswith("darts-fast"):
        assert run(program, "--resume", f"{folder}/my run")[0] == 0


@pytest.mark.parametrize("arguments", [["-h"], ["--help"]])
def test_help_is_one_screen_with_every_command(arguments, run):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "") and out.count("\n") < 24 and max(map(len, out.splitlines())) < 80
    assert [*re.findall("(?m)^  ([a-z]+) ", out)] == list(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_has_its_name(command, run, capsys):
    if command == "profile":
        out = run(command, "-h")[1]
    else:
        with pytest.raises(SystemExit) as done:
            run(command, "-h")
        out = capsys.readouterr().out
        assert done.value.code == 0
    assert out.startswith(f"usage: darts-fast {command} ")


BAD = {
    "": "darts-fast: a command is missing; there are search, train,",
    "serch": "darts-fast: no command 'serch'; there are search, train,",
    "--epochs 2": "darts-fast: no command '--epochs'",
    "search --resume nowhere": "darts-fast search: nowhere is not a folder",
    "train": "darts-fast train: genotype must be given",
    "train --evaluate nowhere --resume b": "darts-fast train: --evaluate takes its settings from nowhere",
    "evaluate": "darts-fast evaluate: the following arguments are required: DIR",
    "evaluate nowhere": "darts-fast evaluate: nowhere is not a folder",
    "evaluate nowhere --epochs 2": "darts-fast evaluate: unrecognized arguments: --epochs 2",
    "draw": "darts-fast draw: the following arguments are required: GENOTYPE",
    "draw DARTS --format jpg": "darts-fast draw: argument --format: invalid choice: 'jpg'",
    "protocol --searches 0": "darts-fast protocol: searches must be at least 1, not 0",
    "profile": "darts-fast profile: what is profiled is a search or a training",
    "profile draw DARTS": "darts-fast profile: what is profiled is a search or a training",
    "profile search --profile -1": "darts-fast search: profile must be 0 or more",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(arguments, run, in_tmp):
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith(BAD[arguments])
    assert os.listdir(in_tmp) == []


@pytest.mark.parametrize("arguments", ["--epochs 0", "--w_lr nan", "--epoch 3", "--dataset cifar-10"])
def test_settings_are_refused_as_by_the_script(arguments, run):
    code, _, err = run("search", *arguments.split())
    assert code == 2 and err.startswith("darts-fast search: ") and BAD_SEARCHES[arguments] in err


def test_the_version_is_that_of_the_metadata_and_the_changelog(run):
    (version,) = re.findall('(?m)^version = "(.*?)"', (ROOT / "pyproject.toml").read_text())
    assert darts_fast.__version__ == version, "install darts_fast again"
    assert run("--version") == (0, f"darts-fast {version}\n", "")
    first, *released = re.findall("(?m)^## (.*)$", (ROOT / "CHANGELOG.md").read_text())
    form = r"(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)"
    assert first == "Unreleased" and all(re.fullmatch(form, heading) for heading in released)
    if released:
        assert re.fullmatch(form, released[0])[1] == version
