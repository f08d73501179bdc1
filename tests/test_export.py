"""Exported networks compute what the trained ones do; their card says what the run said; what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import same
from test_derived import WITHOUT_NOISE, every_operation

from darts_fast import (
    InputError,
    RunError,
    TrainConfig,
    evaluate,
    load_genotype,
    load_network,
    network,
    train,
)
from darts_fast import export as module
from darts_fast.derived import as_safetensors, multiply_adds, packed, parameter_count, unpacked
from darts_fast.export import Deployed, export, main
from darts_fast.genotype import random_genotype
from darts_fast.notation import NAMED
from darts_fast.plot import NoGraphviz
from darts_fast.runs import run_program

ROOT = Path(__file__).resolve().parent.parent
MISSING = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
# Extras, which only these formats need: without them there is nothing to write the file or to run it with.
# What the export says then is tested below.
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="not installed: safetensors"
)
FORMATS = ["torch", pytest.param("onnx", marks=needs_onnx)]
PUBLISHED = [name for name in NAMED if name not in ("DARTS", "PCDARTS")]  # these two are other names


@pytest.fixture
def no_latency(monkeypatch):
    """The time of a call is not measured, which takes half a second each."""
    monkeypatch.setattr(module, "_latency", lambda call, images: float(len(images)))


def called(folder, images):
    """The output of the network in the folder, loaded as a user does it."""
    if (folder / "network.pt2").exists():
        with torch.no_grad():
            return torch.export.load(folder / "network.pt2").module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def saved(path, genotype, stem="cifar", side=8, dataset="tensors", channels=3):
    """A run folder with the final.pt of a network whose batch norms have seen images and scale and shift."""
    torch.manual_seed(0)
    net = network(genotype, 5, 4, 3, channels, stem)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias)
    with torch.no_grad():
        for _ in range(5):
            net.train()(torch.randn(4, channels, side, side))
    mean, std = torch.linspace(100, 130, channels), torch.linspace(70, 50, channels)
    test = {"epoch": 3, "loss": 1.0, "top1": 0.5, "top5": 0.75}
    content = packed(net, mean, std, 0xABCDEF, test, (side, side))
    path.mkdir()
    torch.save(content, path / "final.pt")
    config = TrainConfig(genotype=str(genotype), dataset=dataset, stem=stem, name="made", epochs=3)
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return path


def expected(path, images):
    """The logits of final.pt for uint8 images, normalised by hand in float64."""
    content = torch.load(path / "final.pt", weights_only=True)
    mean, std = (content[key].view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return load_network(path / "final.pt").double()((images.double() - mean) / std)


def pixels(number, channels=3, side=8):
    shape = (number, channels, side, side)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def genotype_of(name):
    """The published one, or of "random 1" that of seed 1."""
    if name in NAMED:
        return NAMED[name]
    return random_genotype(torch.Generator().manual_seed(int(name.split()[1])))


# The published genotypes with the CIFAR stem, random ones with the other. An export takes seconds: each is of
# one format, but for the only one with a factorized convolution.
BY_ONNX = {"DARTS_V2": "cifar", "PDARTS": "cifar", "AmoebaNet": "cifar", "random 1": "imagenet"}
BY_TORCH = {name: "cifar" for name in PUBLISHED if name not in BY_ONNX or name == "AmoebaNet"}
BY_TORCH["random 2"] = "imagenet"


@pytest.mark.parametrize(
    ("name", "stem", "format"),
    [(name, stem, "torch") for name, stem in BY_TORCH.items()]
    + [pytest.param(name, stem, "onnx", marks=needs_onnx) for name, stem in BY_ONNX.items()],
)
def test_exported_networks_compute_what_the_trained_one_does(name, stem, format, in_tmp, no_latency):
    """Of uint8 images, in batches of one and of seven."""
    side = 64 if stem == "imagenet" else 8
    path = saved(in_tmp / "run", genotype_of(name), stem, side)
    folder = export(path, [format])
    for number in (1, 7):
        images = pixels(number, side=side)
        of_trained, found = expected(path, images), called(folder, images)
        assert found.shape == (number, 5) and found.dtype == torch.float32
        assert float(of_trained.abs().max()) > 0.1  # no bound that zeros keep
        assert float((found - of_trained).abs().max()) < 1e-5 * float(of_trained.abs().max())


def test_a_network_with_noise_is_refused(in_tmp):
    path = saved(in_tmp / "run", every_operation(), channels=1)
    for format in ("torch", "safetensors"):
        with pytest.raises(InputError, match="operation noise, so no two calls give the same"):
            export(path, [format], out="out")
    assert os.listdir() == ["run"]


def test_every_operation_is_among_those_exported():
    for names in (BY_TORCH, BY_ONNX):
        genotypes = [genotype_of(name) for name in names]
        found = {
            name for g in genotypes for gene in (g.normal, g.reduce) for node in gene for name, _ in node
        }
        assert found == set(WITHOUT_NOISE)


@pytest.mark.parametrize("format", FORMATS)
def test_float_images_in_and_probabilities_out(format, in_tmp, no_latency):
    path = saved(in_tmp / "run", NAMED["DARTS_V1"], channels=1)
    folder = export(path, [format], dtype="float32", output="probabilities", out="out/here")
    images = pixels(7, channels=1)
    found = called(folder, images / 255)
    assert float((found - expected(path, images).softmax(1)).abs().max()) < 1e-5
    card = json.loads((folder / "card.json").read_text())
    assert card["input"]["dtype"] == "float32" and card["output"]["name"] == "probabilities"
    with pytest.raises(Exception, match=r"(?i)dtype|data type"):  # PyTorch's and onnxruntime's own
        called(folder, images)  # uint8, which would be taken as 255 times too large


def test_an_exported_program_refuses_other_images_and_names_no_file_of_this_machine(in_tmp, no_latency):
    folder = export(saved(in_tmp / "run", NAMED["DARTS_V1"]))
    program = torch.export.load(folder / "network.pt2").module()
    with pytest.raises(RuntimeError, match="dtype"):
        program(pixels(2).float())
    with pytest.raises(AssertionError, match=r"size\(\)\[2\] == 8"):
        program(pixels(2, side=16))
    for file in folder.iterdir():
        assert str(ROOT).encode() not in file.read_bytes(), file


@needs_safetensors
def test_safetensors_are_read_back_to_the_same_bits(run, in_tmp, no_latency):
    """Weights, statistics, the auxiliary head; arguments, mean and deviation, checksum, test."""
    folder = export(run.path, ["safetensors"])
    found, own = unpacked(folder / "network.safetensors"), unpacked(run.path / "final.pt")
    assert same(found[1], own[1]) and same(found[0].state_dict(), own[0].state_dict())
    assert found[0].arguments == own[0].arguments and not found[0].training
    assert any(name.startswith("auxiliary_head.") for name in found[0].state_dict())
    images = torch.randn(3, 3, 24, 24)
    assert torch.equal(load_network(folder / "network.safetensors")(images), own[0](images))
    assert json.loads((folder / "card.json").read_text())["input"] is None


@needs_safetensors
def test_a_damaged_safetensors_file_is_refused_in_one_sentence(run, in_tmp, monkeypatch):
    from safetensors.torch import save

    tensors, metadata = as_safetensors(unpacked(run.path / "final.pt")[1])
    whole = save(tensors, metadata)
    content = json.loads(metadata["darts_fast"])

    def changed(**values):
        return save(tensors, {"darts_fast": json.dumps({**content, **values})})

    files = {
        "cut": whole[:-10],
        "text": b"no such file",
        "plain": save(tensors),
        "list": save(tensors, {"darts_fast": "[]"}),
        "mean": changed(mean="12"),
        "std": changed(std=[0.0, 1.0, 1.0]),
        "size": changed(image_size=[24]),
        "code": changed(network={**content["network"], "genotype": "print(1)"}),
        "less": save({name: tensors[name] for name in list(tensors)[1:]}, metadata),
        "more": changed(other=1),
    }
    for name, written in files.items():
        file = Path(f"{name}.safetensors")
        file.write_bytes(written)
        with pytest.raises(InputError, match=r"\.safetensors cannot be read as a trained network") as error:
            load_network(file)
        assert "\n" not in str(error.value)
    os.mkfifo("pipe.safetensors")
    for name, sentence in (("pipe", "is not a regular file"), ("none", "there is no file none.safetensors")):
        with pytest.raises(InputError, match=sentence):
            load_network(f"{name}.safetensors")
    Path("whole.safetensors").write_bytes(whole)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"safetensors is not installed \(pip install safetensors\)"):
        load_network("whole.safetensors")


TINY = TrainConfig(
    genotype="DARTS_V2", epochs=3, init_channels=2, layers=3, batch_size=10, ema=0.5, lr=0.1, seed=11,
    name="tiny", drop_path_prob=0.0, cutout_length=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    """40 images to train, 30 to test, of three classes that differ in their brightness; they are large enough
    for the auxiliary head."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(70) % 3
    images = torch.randint(0, 150, (70, 3, 24, 24), generator=generator) + 30 * labels[:, None, None, None]
    return images[:40].byte(), labels[:40], images[40:].byte(), labels[40:]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(TINY, data, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("which", ["final", "best", "ema"])
def test_the_card_has_the_figures_of_the_run(which, run, data, in_tmp, no_latency):
    folder = export(run.path, which=which)
    assert folder == Path("exports", "tiny")
    card, text = json.loads((folder / "card.json").read_text()), (folder / "card.md").read_text()
    top1 = {"final": run.top1, "best": run.best_top1, "ema": run.ema_top1}[which]
    means = evaluate(run.path, data=data)[f"{which}.pt"]
    assert card["accuracy"]["top1"] == top1 == means[1] and card["accuracy"]["top5"] == means[2]
    assert card["accuracy"]["epoch"] == (run.best_epoch if which == "best" else 3)
    assert card["accuracy"]["seed"] == 11 and card["accuracy"]["images"] == "the test images"
    assert (card["parameters"], card["multiply_adds"]) == (run.parameters, run.multiply_adds)
    content = torch.load(run.path / f"{which}.pt", weights_only=True)
    assert card["mean"] == content["mean"].tolist() and int(card["data"]["crc32"], 16) == content["data"]
    config = json.loads((run.path / "config.json").read_text())
    assert card["settings"].items() <= config.items() and card["settings"]["lr"] == 0.1
    assert card["trained_with"] == config["environment"] and card["network"]["genotype"] == config["genotype"]
    assert f"**{100 * top1:.2f} %**" in text and f"| {run.parameters:,} |" in text and "| seed | 11 |" in text
    assert ("chosen by this very accuracy" in text) == (which == "best")
    assert (folder / "genotype.svg").read_text().count("sep_conv_3x3") >= 5 and "(genotype.svg)" in text
    times = {"1": 1.0, "64": 64.0}
    assert card["latency"]["milliseconds"] == {"eager": times, "torch": times}
    images, labels = data[2:]
    accuracy = (called(folder, images).argmax(1) == labels).float().mean()
    assert float(accuracy) == pytest.approx(top1)


@needs_onnx
@needs_safetensors
def test_the_code_on_the_card_runs(run, in_tmp, no_latency):
    """In the folder; that of torch and of ONNX without darts_fast."""
    folder = export(run.path, ["torch", "onnx", "safetensors"])
    codes = re.findall(r"```python\n(.*?)```", (folder / "card.md").read_text(), re.DOTALL)
    own = "import sys\nassert 'darts_fast' not in sys.modules\nsys.modules['darts_fast'] = None"
    parts = [own, *codes[:2], "del sys.modules['darts_fast']", codes[2]]
    parts = [f"{part}\n{'print(tuple(logits.shape))' if part in codes else ''}" for part in parts]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(parts)], cwd=folder, capture_output=True, text=True, check=True
    )
    assert len(codes) == 3 and done.stdout == "(7, 3)\n" * 3
    assert str(ROOT).encode() not in (folder / "network.onnx").read_bytes()


@pytest.mark.parametrize(("seconds", "number"), [(0.3, 5), (0.02, 17)])
def test_latency_is_the_median_of_the_calls_after_the_first(seconds, number, monkeypatch):
    """Of five calls, or of half a second."""
    calls, clock = [], [0.0]

    def call(images):
        calls.append(images)
        clock[0] += 3 if len(calls) == 1 else 0.1 if len(calls) <= 3 else seconds

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert module._latency(call, "images") == pytest.approx(1000 * seconds)
    assert calls == ["images"] * (1 + number)


def test_a_training_on_a_part_says_what_judged_it(data, in_tmp, no_latency):
    config = dataclasses.replace(TINY, train_portion=0.5, ema=0.0, epochs=1, name="part")
    result = train(config, data)
    text = (export(result.path) / "card.md").read_text()
    assert "top-1 accuracy on the training images held out" in text and "test images" not in text


def test_a_file_of_before_takes_the_size_of_its_images_from_the_data_set(in_tmp, no_latency):
    for dataset in ("digits", "tensors"):
        path = saved(in_tmp / dataset, NAMED["DARTS_V1"], dataset=dataset, channels=1)
        content = torch.load(path / "final.pt", weights_only=True)
        assert content.pop("image_size") == [8, 8]
        torch.save(content, path / "final.pt")
    folder = export("digits")
    assert json.loads((folder / "card.json").read_text())["image_size"] == [8, 8]
    with pytest.raises(InputError, match="began with tensors"):
        export("tensors", out="other")


def test_what_cannot_be_drawn_is_exported_without_a_picture(in_tmp, no_latency, monkeypatch):
    path = saved(in_tmp / "run", NAMED["DARTS_V1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("darts_fast.plot.MOST_DRAWN", 7)
        folders = [export(path, out="large")]

    def no_graphviz(*arguments):
        raise NoGraphviz("no Graphviz")

    monkeypatch.setattr("darts_fast.plot.render", no_graphviz)
    folders.append(export(path, out="undrawn"))
    for folder in folders:
        assert sorted(os.listdir(folder)) == ["card.json", "card.md", "network.pt2"]
        assert "genotype.svg" not in (folder / "card.md").read_text()


def test_a_network_that_computes_something_else_is_not_kept(run, in_tmp, monkeypatch):
    for wrong in (0.01, float("nan")):
        monkeypatch.setattr(module, "_loaded", lambda path, by=wrong: lambda x: torch.full((len(x), 3), by))
        with pytest.raises(RunError, match=r"network\.pt2 differs by .* it is not kept"):
            export(run.path)
    assert [path for path in in_tmp.rglob("*") if path.is_file()] == []
    assert os.listdir("exports") == []


@needs_onnx
def test_without_onnxruntime_the_card_says_that_nothing_was_compared(run, in_tmp, no_latency, monkeypatch):
    plain = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: name != "onnxruntime" and plain(name))
    folder = export(run.path, ["onnx"])
    assert json.loads((folder / "card.json").read_text())["largest_difference"] == {"onnx": None}
    text = (folder / "card.md").read_text()
    assert "was not compared" in text and "ONNX Runtime" not in text


BAD = {
    "": "the following arguments are required: DIR",
    "nowhere": "nowhere is not a folder; name the folder of a run, such as augments/digits",
    f"{'d' * 5000}": "is not a folder",
    "empty": "empty is not the folder of a training: its config.json cannot be read",
    "run --format tensorflow": "invalid choice: 'tensorflow'",
    "run --which last": "invalid choice: 'last'",
    "run --which best": "run has no best.pt: no epoch was finished: resume the training",
    "run --which ema": "run has no ema.pt: the training has not come to its end, or had no --ema",
    "run --input int8": "invalid choice: 'int8'",
    "run --output labels": "invalid choice: 'labels'",
    "run --format safetensors --output probabilities": "input and output are for the formats torch and onnx",
    "run --out .": ". exists and is not overwritten; choose another --out",
    "run --out run": "run exists and is not overwritten; choose another --out",
    "run --out run/config.json/x": "cannot write run/config.json",
    f"run --out {'o' * 300}": "cannot write oooo",
    "begun": "begun has no final.pt: the training has not come to its end: resume it, or export its --which",
    "damaged": "damaged/final.pt cannot be read as a trained network",
    "tested": "tested/final.pt cannot be read as a trained network (test.top1 is 1.5",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders, good and bad, which no test changes."""
    path = tmp_path_factory.mktemp("folders")
    saved(path / "run", load_genotype("DARTS_V1"))
    for name in ("begun", "damaged", "tested"):
        saved(path / name, load_genotype("DARTS_V1"))
    (path / "begun" / "final.pt").unlink()
    (path / "damaged" / "final.pt").write_bytes((path / "run" / "final.pt").read_bytes()[:-50])
    content = torch.load(path / "tested" / "final.pt", weights_only=True)
    content["test"]["top1"] = 1.5
    torch.save(content, path / "tested" / "final.pt")
    (path / "empty").mkdir()
    return path


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    code = run_program("export", main)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(arguments, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    code, out, err = call(monkeypatch, capsys, *arguments.split())
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("export: ") and BAD[arguments] in err
    assert sorted(folders.rglob("*")) == before


@pytest.mark.parametrize(
    ("format", "missing"), [("onnx", ["onnx", "onnxscript"]), ("safetensors", ["safetensors"])]
)
def test_a_package_that_is_not_installed(format, missing, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(module, "_installed", lambda name: name not in missing)
    code, _, err = call(monkeypatch, capsys, "run", "--format", "torch", format)
    assert code == 2 and not (folders / "exports").exists()
    assert err == (
        f"export: the format {format} needs what is not installed here: pip install {' '.join(missing)}\n"
    )


def test_the_program_exports_once(run, in_tmp, no_latency, monkeypatch, capsys):
    """In place of what a killed export has left."""
    (in_tmp / "there.partial").mkdir()
    (in_tmp / "there.partial/network.onnx").write_text("half")
    code, out, _ = call(monkeypatch, capsys, str(run.path), "--out", "there")
    assert code == 0
    assert out.splitlines()[-1] == "wrote 'there': card.json, card.md, genotype.svg, network.pt2"
    before = {path: path.read_bytes() for path in (in_tmp / "there").iterdir()}
    code, _, err = call(monkeypatch, capsys, str(run.path), "--out", "there")
    assert code == 2 and err == "export: there exists and is not overwritten; choose another --out\n"
    assert before == {path: path.read_bytes() for path in (in_tmp / "there").iterdir()}
    assert os.listdir(in_tmp) == ["there"]


def test_the_exported_network_has_no_auxiliary_head(run):
    net, content = unpacked(run.path / "final.pt")
    deployed = Deployed(net, content["mean"], content["std"], "uint8", "logits")
    count = sum(p.numel() for p in deployed.parameters())
    assert count == parameter_count(net) < sum(p.numel() for p in net.parameters())
    assert multiply_adds(deployed.network, 24, 24) == run.multiply_adds
