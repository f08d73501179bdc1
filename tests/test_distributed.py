"""Several processes, as torchrun starts them, against one: by gloo, on a CPU."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SPACE, assert_same_run, checkpoint, log_lines, relative_error, same
from PIL import Image
from processes import start
from test_capture import Driver, NothingFromTheHost, changed
from test_derived import WITHOUT_NOISE, every_operation
from test_run import load_program

from darts_fast import (
    InputError,
    ProtocolConfig,
    RunError,
    SearchConfig,
    TrainConfig,
    network,
    resume_search,
    resume_training,
    search,
    train,
)
from darts_fast import distributed as distributed_module
from darts_fast.data import from_tensors, seeded
from darts_fast.distributed import Ranks, joined
from darts_fast.evaluation import evaluated
from darts_fast.kernels import aten as aten_backend
from darts_fast.kernels.backends import using
from darts_fast.loop import RANKS, Loop, check_shares
from darts_fast.protocol import protocol, resume_protocol
from darts_fast.runs import CHECKPOINT, METRICS, Stopped
from darts_fast.search import Search
from darts_fast.search_step import SearchStep
from darts_fast.spaces import read_space
from darts_fast.supernet import Supernet
from darts_fast.train import Training
from darts_fast.train_step import TrainStep

ROOT = Path(__file__).resolve().parent.parent

# Processes as torchrun starts them


LIMIT = 240  # seconds, also on a busy machine: what takes longer hangs


def on_ranks(size, work, folder):
    """Calls `work(folder)` in so many new processes, the ranks of one run; their exit codes. When one has
    failed, the others are killed after some seconds. What they print, this process prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = folder / "printed"
    ranks = [start(one_rank, rank, size, port, work, folder, output=printed) for rank in range(size)]
    for process in ranks:
        process.join(5 if any(other.exitcode for other in ranks) else LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    print(printed.read_text())
    return [process.exitcode for process in ranks]


def one_rank(rank, size, port, work, folder):
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**own, "MASTER_PORT": port}.items()})
    torch.set_num_threads(1)
    work(folder)


# One step


def batch(seed, side=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(7, 3, side, side, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (7,), generator=generator)


SEARCH_STEPS = {
    "exact": {},
    "exact, fused": {"fused": True},
    "finite differences": {"hvp": "finite-difference"},
    "finite differences, fused": {"hvp": "finite-difference", "fused": True},
    "first order": {"order": 1},
    "Beta-DARTS, random": {"beta_decay": 5.0, "perturb": "random"},
    "adversarial": {"order": 1, "perturb": "adversarial"},
}
TRAIN_STEPS = {"training": {}, "training, fused": {"fused": True}}


def names_of(size):
    """The kinds of steps that are taken by so many ranks."""
    return [*SEARCH_STEPS, *TRAIN_STEPS] if size == 2 else ["exact, fused", "finite differences", "training"]


def step_of(name, average=None):
    if name in SEARCH_STEPS:
        return search_step(SEARCH_STEPS[name], average)
    return training_step(TRAIN_STEPS[name], average)


def search_step(settings, average=None):
    torch.manual_seed(0)
    config = SearchConfig(**settings)
    module = Supernet(2, 4, 3, fused=config.fused, space=read_space(SMALL_SPACE)).double()
    average = {} if average is None else {"average": average}
    step = SearchStep(module, config, seeded("cpu", 1), **average)
    step.beta.fill_(3.0)
    return step


def training_step(settings, average=None):
    torch.manual_seed(0)
    config = TrainConfig(**settings)
    module = network(every_operation(WITHOUT_NOISE), 4, 4, 3, auxiliary=True, fused=config.fused).double()
    average = {} if average is None else {"average_gradients": average}
    return TrainStep(module, config, **average)


def optimizers_of(step):
    return [step.optimizer] if isinstance(step, TrainStep) else [step.weight_optimizer, step.alpha_optimizer]


def state_of(step):
    """Returns the tensors that decide the next step, by name, without running statistics."""
    found = dict(step.network.named_parameters())
    for number, optimizer in enumerate(optimizers_of(step)):
        for index, state in enumerate(optimizer.state.values()):
            found |= {f"{number}.{index}.{name}": tensor for name, tensor in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def one_step(step, part):
    """Takes a step with momenta, on what `part` returns of each batch; returns loss and state after it."""
    generator = torch.Generator().manual_seed(5)
    for optimizer in optimizers_of(step):
        for state in optimizer.state.values():
            for name, tensor in state.items():
                if name != "step":
                    tensor.copy_(0.1 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    if isinstance(step, TrainStep):
        tensors = batch(1, side=24)  # the least that the auxiliary head takes
    else:
        tensors = *batch(1), *batch(2)
    return {"loss": step.take(*map(part, tensors))[0], **state_of(step)}


def on_two_ranks(folder):
    """Computes what the tests of two ranks look at, so that one pair of processes does for all of them."""
    steps_on_ranks(folder)
    captured_steps(folder)
    for kind in RUNS:
        whole_runs(kind, folder / kind)


def on_three_ranks(folder):
    steps_on_ranks(folder)
    faults(folder)


def steps_on_ranks(folder):
    with joined() as ranks:
        found = {}
        ranks.set_share(7)
        for name in names_of(ranks.size):
            step = step_of(name, ranks.average)
            with NothingFromTheHost() if "fused" in name else contextlib.nullcontext():
                found[name] = one_step(step, ranks.part)
        found["float16"] = float16_step(ranks)
        torch.save(found, folder / f"{ranks.rank}.pt")


def captured_steps(folder):
    """Takes two epochs of four batches of 6 images and one of 5, captured (see `Driver`) and uncaptured; of
    each batch rank 1 has 3 images."""
    with joined() as ranks, using(aten_backend), pytest.MonkeyPatch.context() as patch:
        config = dataclasses.replace(TINY, batch_size=6, order=1)
        plain, captured = (Search(config, from_tensors(*data()), ranks) for _ in range(2))
        driver = Driver(patch, *changed(captured))
        captured.take.graph, equal = True, []
        for epoch in range(2):
            for found in (plain, captured):
                found.epoch, found.step = epoch, 0
                found.begin_epoch()
            for step in range(plain.steps_per_epoch):
                plain.step = captured.step = step
                equal.append(torch.equal(*(found.take_step(0.1)[0] for found in (plain, captured))))
        equal.append(same(plain.state(), captured.state()))
        replays = [graph.replays for graph in driver.graphs]
        (folder / f"captured-{ranks.rank}.json").write_text(json.dumps({"equal": equal, "replays": replays}))


def float16_step(ranks):
    """Takes a step in which the gradients of the last rank alone overflow."""
    torch.manual_seed(0)
    config = SearchConfig(fused=True, amp_dtype="float16", order=1)
    module = Supernet(2, 4, 3, fused=True, space=read_space(SMALL_SPACE))
    step = SearchStep(module, config, average=ranks.average)
    before = state_of(step)
    images, labels = (ranks.part(tensor) for tensor in batch(1))
    images = images.float()
    if ranks.rank == ranks.size - 1:
        images[:] = torch.inf
    step.take(images, labels, images, labels)
    return {
        "unchanged": torch.tensor(same(before, state_of(step))),
        "scale": step.loss_scale.value,
    }


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory):
    """A function: the folder that 2 or 3 ranks wrote. They are started once."""

    @functools.cache
    def left(size):
        folder = tmp_path_factory.mktemp("ranks")
        for kind in RUNS:
            (folder / kind).mkdir()
        assert on_ranks(size, on_two_ranks if size == 2 else on_three_ranks, folder) == [0] * size
        return folder

    return left


def steps_of(folder, size):
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def parts_apart(step, size):
    """The step, with logits computed of each rank's images apart: its loss is the mean of the ranks'
    losses."""
    module, kind = step.network, "forward" if isinstance(step, TrainStep) else "logits"
    plain = getattr(module, kind)

    def of_parts(images, *rest):
        found = [plain(Ranks(rank, size).part(images), *rest) for rank in range(size)]
        if isinstance(found[0], tuple):
            return tuple(torch.cat(heads) for heads in zip(*found, strict=True))
        return torch.cat(found)

    setattr(module, kind, of_parts)
    return step


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size in (2, 3) for name in names_of(size)], ids=str
)
def test_a_step_is_that_of_one_process_which_averages_the_losses(size, name, ranks_folder):
    step, of_ranks = step_of(name), steps_of(ranks_folder(size), size)
    begun = state_of(step)
    expected = one_step(parts_apart(step, size), lambda tensor: tensor)
    found = [of_rank[name] for of_rank in of_ranks]
    shares = [Ranks(rank, size).share_of(7) for rank in range(size)]
    losses = [share * one.pop("loss") for share, one in zip(shares, found, strict=True)]
    assert relative_error(sum(losses), expected.pop("loss")) < 1e-12
    for one in found[1:]:
        assert same(found[0], one)
    for key, tensor in expected.items():
        assert relative_error(found[0][key], tensor) < 1e-12 or not tensor.any(), key
    moved = [key for key in begun if not torch.equal(begun[key], found[0][key])]
    assert len(moved) > len(begun) / 2


def test_ranks_capture_and_replay_in_the_same_steps(ranks_folder):
    """With the all-reduces in the captured step; to the bits of uncaptured ones."""
    for rank in range(2):
        found = json.loads((ranks_folder(2) / f"captured-{rank}.json").read_text())
        assert found == {"equal": [True] * 11, "replays": [8, 2]}


def test_ranks_decide_together_that_float16_overflowed(ranks_folder):
    first, second = (of_rank["float16"] for of_rank in steps_of(ranks_folder(2), 2))
    assert first["unchanged"] and first["scale"] <= 2.0**11 and same(first, second)


# Whole runs

TINY = SearchConfig(
    epochs=2, init_channels=2, layers=3, batch_size=12, train_portion=0.59, cutout_length=2, print_freq=2,
    fused=True, name="run", space=SMALL_SPACE,
)  # fmt: skip
# 29 images train: batches of 12, 12 and 5
TRAINING = TrainConfig(
    genotype=str(every_operation(WITHOUT_NOISE)), epochs=2, init_channels=4, layers=3, batch_size=12,
    drop_path_prob=0.3, cutout_length=2, ema=0.9, print_freq=2, aux_weight=0, fused=True, name="run",
)  # fmt: skip


RUNS = {
    "search": (search, resume_search, TINY, Search),
    "training": (train, resume_training, TRAINING, Training),
}


def data(test=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(50) % 4
    return (images[:29], labels[:29], images[29:], labels[29:]) if test else (images, labels)


def whole_runs(kind, folder):
    """Runs once undisturbed, and once stopped by a SIGTERM to rank 1 alone in the fourth step and resumed."""
    rank = int(os.environ["RANK"])
    begin, go_on, config, loop = RUNS[kind]
    arguments = data(test=kind == "training")
    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = begin(config, arguments, Path("undisturbed"))
        calls, plain = [], loop.take_step

        def take_step(self, lr):
            calls.append(None)
            if len(calls) == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, lr)

        loop.take_step = take_step
        try:
            begin(config, arguments, Path("stopped"))
        except Stopped as stop:
            code = stop.exit_code
        loop.take_step = plain
        if rank == 0:
            torch.save(checkpoint(Path("stopped/run")), "middle.pt")
        again = go_on("stopped/run", arguments)._replace(path=None)
        found = result._replace(path=None)
    (folder / f"{rank}.json").write_text(
        json.dumps({"code": code, "printed": len(printed.getvalue()), "same": found == again})
    )


@pytest.fixture(params=RUNS)
def two_ranks(request, ranks_folder):
    return request.param, ranks_folder(2) / request.param


def test_a_signal_to_one_rank_stops_all_and_resume_gives_the_same_bits(two_ranks):
    _, folder = two_ranks
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["code"] for one in said] == [143, 143] and all(one["same"] for one in said)
    assert said[0]["printed"] > 500 and said[1]["printed"] == 0
    middle = torch.load(folder / "middle.pt", weights_only=True)
    assert (middle["epoch"], middle["step"]) == (1, 1) and len(middle[RANKS]) == 2
    first, second = middle[RANKS]
    # Within an epoch each has its own.
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert_same_run(folder / "undisturbed/run", folder / "stopped/run")


def test_the_ranks_metrics_are_of_all_images(two_ranks):
    """The metrics of an epoch, against the network at its end, tested by one process."""
    kind, folder = two_ranks
    if kind == "search":
        run = Search(TINY, from_tensors(*data()))
        images = run.batches, run.validation_half
    else:
        run = Training(TRAINING, from_tensors(*data(test=True)))
        images = run.judge_batches, run.judge_order
    state = checkpoint(folder / "undisturbed/run")
    run.network.load_state_dict(state["network"])
    found = evaluated(run.network, *images, 12)
    rows = [json.loads(line) for line in (folder / "undisturbed/run" / METRICS).read_text().splitlines()]
    name = "val" if kind == "search" else "test"
    last = [row for row in rows if f"{name}_loss" in row][-1]
    assert found == pytest.approx([last[f"{name}_{what}"] for what in ("loss", "top1", "top5")], rel=1e-5)
    for row in rows:
        if "loss" in row:  # hits of whole batches
            images = 5 if row["step"] % 3 == 0 else 12
            assert row["top1"] * images == pytest.approx(round(row["top1"] * images))
    assert state["totals"] == [0.0] * 4


def test_another_number_of_processes_goes_on_and_says_so(two_ranks, in_tmp, monkeypatch):
    kind, folder = two_ranks
    go_on = RUNS[kind][1]
    copied = Path(shutil.copytree(folder / "stopped/run", in_tmp / "copied"))
    shutil.copy(folder / "middle.pt", copied / CHECKPOINT)
    plain = Loop.load

    def load(self, state):
        plain(self, state)
        each = [saved["statistics"] for saved in state_before[RANKS]]
        flat = torch.cat([tensor.flatten() for tensor in self._statistics()])
        assert torch.equal(flat, torch.stack(each).mean(dim=0))

    state_before = checkpoint(copied)
    monkeypatch.setattr(Loop, "load", load)
    go_on(copied, data(test=kind == "training"))
    assert any(line.startswith("processes: 2 -> 1; the bits differ") for line in log_lines(copied))
    assert RANKS not in checkpoint(copied) and checkpoint(copied)["epoch"] == 2


def test_a_checkpoint_of_ranks_that_somebody_changed_is_refused(two_ranks, in_tmp):
    kind, folder = two_ranks
    go_on = RUNS[kind][1]
    copied = Path(shutil.copytree(folder / "stopped/run", in_tmp / "copied"))
    state = checkpoint(copied)
    for change in (
        lambda ranks: ranks.pop(),
        lambda ranks: ranks[1].pop("augmentation"),
        lambda ranks: ranks[1].update(statistics=torch.zeros(3)),
        lambda ranks: ranks[1].update(augmentation=torch.zeros(3)),
    ):
        changed = [dict(saved) for saved in state[RANKS]]
        change(changed)
        torch.save({**state, RANKS: changed}, copied / CHECKPOINT)
        with pytest.raises(InputError, match="does not fit the settings beside it"):
            go_on(copied, data(test=kind == "training"))


# Ranks that fail


def killed(folder):
    os.chdir(folder)
    plain, calls = Search.take_step, []

    def take_step(self, lr):
        calls.append(None)
        if len(calls) == 5 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, lr)

    Search.take_step = take_step
    try:
        search(TINY, data(), Path("killed"))
    except RunError as error:
        assert "another process of this run has ended" in str(error)
        raise SystemExit(7) from error


def gone_on(folder):
    os.chdir(folder)
    resume_search("killed/run", data())


def test_a_killed_rank_ends_all_and_resume_gives_the_same_bits(ranks_folder, tmp_path):
    undisturbed = ranks_folder(2) / "search/undisturbed/run"
    assert on_ranks(2, killed, tmp_path) == [7, -signal.SIGKILL]  # the first by itself, in time
    assert checkpoint(tmp_path / "killed/run")["epoch"] == 1
    assert on_ranks(2, gone_on, tmp_path) == [0, 0]
    assert_same_run(undisturbed, tmp_path / "killed/run")


def faults(folder):
    os.chdir(folder)
    rank = int(os.environ["RANK"])

    def flipped(self):
        if rank == 2:
            self.network.flat_weights.detach().view(torch.int32)[3] ^= 1
        plain(self)

    def not_a_number(self, lr):
        found, images = step(self, lr)
        return found + (torch.nan if rank == 1 else 0), images

    def other_images():
        images, labels = data()
        images[0] = rank
        return images, labels

    def without_files(self, lr):
        if rank == 2 and self.step == 1:
            shutil.rmtree(folder / "images-2")
        return step(self, lr)

    write_images(folder / f"images-{rank}", *data())
    streamed = {
        "dataset": "folder", "data_path": f"images-{rank}", "image_size": 8, "stream": True, "workers": 0,
    }  # fmt: skip
    said = {}
    plain, step = Loop._average_statistics, Search.take_step
    for name, patches, of_run, settings in (
        ("flipped", {"_average_statistics": flipped}, data(), {}),
        ("nan", {"take_step": not_a_number}, data(), {}),
        ("data", {}, other_images(), {}),
        ("alone", {"__init__": refused(rank)}, data(), {}),
        ("file", {"take_step": without_files}, None, streamed),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for attribute, value in patches.items():
                patch.setattr(Search, attribute, value)
            try:
                search(dataclasses.replace(TINY, name=None, **settings), of_run, Path(name))
            except (InputError, RunError) as error:
                said[name] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(said))


def write_images(folder, images, labels):
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / str(label) / f"{number}.png")


def refused(rank):
    plain = Search.__init__

    def init(self, *arguments):
        if rank == 2:
            raise InputError("no memory here")
        plain(self, *arguments)

    return init


def test_what_is_wrong_on_one_rank_ends_all(ranks_folder):
    folder = ranks_folder(3)
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[0]["flipped"].startswith(
        "RunError: network.stem.0.weight of rank 2 differs from rank 0's after epoch 1"
    )
    assert said[0]["nan"].startswith("RunError: the training loss is nan at step 1")
    assert said[0]["data"].startswith("InputError: rank 1: tensors holds other images here than for rank 0")
    assert said[0]["alone"] == "InputError: rank 2: no memory here"
    assert not (folder / "alone").exists()
    assert said[0]["file"].startswith("DamagedImage: rank 2: images-2/")
    assert "could not be read as an image" in said[0]["file"] and "saved after 1 steps" in said[0]["file"]
    assert checkpoint(folder / "file/folder")["step"] == 1


def suspended(folder):
    distributed_module.BEAT, distributed_module.LOST = 0.1, 1.0
    with joined() as ranks:
        if ranks.rank == 1:
            (folder / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.largest(0)


def test_a_suspended_rank_ends_the_others(tmp_path, capsys):
    assert on_ranks(2, suspended, tmp_path) == [1, -signal.SIGKILL]  # which kills the suspended one
    assert "rank 0: rank 1 has not answered for 1 seconds; go on" in capsys.readouterr().out


# Sharing


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [7, 8, 64])
def test_parts_are_the_whole_batch(size, images):
    ranks, indices = [Ranks(rank, size) for rank in range(size)], torch.arange(images)
    parts = [rank.part(indices) for rank in ranks]
    assert torch.equal(torch.cat(parts), indices)
    assert {len(part) for part in parts} <= ranks[0].part_sizes(images)
    assert sum(rank.share_of(images) for rank in ranks) == pytest.approx(1, abs=1e-15)


def test_batches_that_cannot_be_shared():
    check_shares(64, 718, 4)
    with pytest.raises(InputError, match="must be divisible by 3, not be 64"):
        check_shares(64, 718, 3)
    with pytest.raises(
        InputError, match="129 images in batches of 64 end in a batch of 1, which 2 processes"
    ):
        check_shares(64, 129, 2)


class ThreeAlike(Ranks):
    """Three ranks whose tensors are the same, in one process."""

    def __init__(self):
        super().__init__(0, 3)

    def sum(self, tensor):
        return tensor.copy_(tensor + tensor + tensor)

    def gathered(self, tensor):
        return [tensor] * 3


def test_statistics_that_are_averaged_stay_as_they_are():
    """A run that was stopped in an evaluation resumes there, with what was averaged before it."""
    images = torch.zeros(24, 1, 8, 8, dtype=torch.uint8)
    config = SearchConfig(batch_size=6, init_channels=2, layers=3, space=SMALL_SPACE)
    run = Search(config, from_tensors(images, torch.arange(24) % 3), ThreeAlike())
    before = [tensor.uniform_(0.5, 1.5).clone() for tensor in run._statistics()]
    run._average_statistics()
    assert all(map(torch.equal, run._statistics(), before))


def test_one_process_exchanges_nothing(monkeypatch):
    monkeypatch.setattr(distributed_module, "dist", None)
    for name in distributed_module.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        gradient = {"weights": torch.ones(3)}
        assert ranks.average(gradient)["weights"] is gradient["weights"]
        assert ranks.largest(3) == 3 and ranks.of_first(0.5) == 0.5 and ranks.device("cuda:1") == "cuda:1"
        with ranks.together():
            assert ranks.in_turn(lambda: 5) == 5


# The programs under torchrun


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


CHEAP = "--init_channels 2 --layers 3 --print_freq 1 --device cpu --fused".split()


def test_a_signal_to_torchrun_stops_a_search_and_saves(tmp_path):
    settings = (*CHEAP, "--epochs", 60, "--batch_size", 256, "--order", 1)
    run = torchrun(ROOT / "run.py", *settings, cwd=tmp_path)
    for line in run.stdout:
        if "step 2/3" in line:
            break
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=LIMIT)
    said = "run.py: stopped and saved after [0-9]+ steps; go on with: torchrun ... run.py --resume searchs"
    assert run.returncode and len(re.findall(said, errors)) == 1, errors
    state = checkpoint(tmp_path / "searchs/digits")
    assert len(state[RANKS]) == 2 and state["settings"]["batch_size"] == 256


def test_torchrun_trains_a_genotype(tmp_path):
    settings = (*CHEAP, "--epochs", 1, "--batch_size", 512, "--genotype", "DARTS_V2")
    run = torchrun(ROOT / "run_from.py", *settings, cwd=tmp_path)
    out, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, errors
    assert len(re.findall("Epoch 1/1 step [123]/3  ", out)) == 3 and out.count("after the last epoch") == 1
    assert (tmp_path / "augments/digits/final.pt").exists()


def test_torchrun_says_once_what_is_refused(tmp_path):
    run = torchrun(ROOT / "run.py", "--batch_size", 63, cwd=tmp_path)
    out, errors = run.communicate(timeout=LIMIT)
    sentence = "run.py: batch_size is that of all 2 processes together and must be divisible by 2, not be 63"
    assert run.returncode and errors.count(sentence) == 1, errors
    assert not out and not list(tmp_path.iterdir())


def test_what_one_process_computes_is_refused_under_torchrun(monkeypatch, in_tmp):
    for name in distributed_module.VARIABLES:
        monkeypatch.setenv(name, "2")
    for call in (lambda: protocol(ProtocolConfig()), lambda: resume_protocol("x")):
        with pytest.raises(InputError, match="the protocol runs in one process: start it by python, not by"):
            call()
    monkeypatch.setattr(sys, "argv", ["run_from.py", "--evaluate", "x"])
    with pytest.raises(InputError, match="trained networks are tested in one process"):
        load_program("run_from").main()
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("name", "resumed", "gpus", "expected"),
    [
        (None, False, 0, "cpu"),
        ("cpu", False, 8, "cpu"),
        ("cuda:1", False, 8, "leave out --device cuda:1"),
        ("cuda", False, 3, r"more processes on this machine than it has GPUs \(3\)"),
        (None, False, 4, "cuda:3"),
        ("cuda:0", True, 4, "cuda:3"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(name, resumed, gpus, expected, monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    ranks = Ranks(3, 4)
    if len(expected) > 6:
        with pytest.raises(InputError, match=expected):
            ranks.device(name, resumed)
    else:
        assert ranks.device(name, resumed) == expected
        assert chosen == ([] if expected == "cpu" else [3])
