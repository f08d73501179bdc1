"""Exports a trained network, to be used without its training: darts-fast export augments/digits"""

import dataclasses
import importlib.util
import io
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from darts_fast import plot
from darts_fast.card import markdown
from darts_fast.config import HIDDEN, OneSentenceParser, TrainConfig
from darts_fast.datasets import read_data
from darts_fast.derived import (
    DerivedNetwork,
    as_safetensors,
    multiply_adds,
    network,
    parameter_count,
    unpacked,
)
from darts_fast.distributed import refuse_ranks
from darts_fast.errors import InputError, RunError, one_line, say
from darts_fast.process import within_quota
from darts_fast.runs import (
    environment,
    processor,
    read_config,
    run_program,
    write_atomically,
    write_json,
    writing,
)
from darts_fast.state import check_keys, check_number
from darts_fast.train import AVERAGE, BEST, FINAL

FOLDER = "exports"

# A saved network: its file, and why it may not be there.
SAVED = {
    "final": (FINAL, "the training has not come to its end: resume it, or export its --which best"),
    "best": (BEST, "no epoch was finished: resume the training"),
    "ema": (AVERAGE, "the training has not come to its end, or had no --ema"),
}
# A format: its file, and the packages that write it.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("network.pt2", ()),
    "onnx": ("network.onnx", ("onnx", "onnxscript")),
    "safetensors": ("network.safetensors", ("safetensors",)),
}
INPUTS = {"uint8": "pixel values from 0 to 255", "float32": "pixel values divided by 255, from 0 to 1"}
OUTPUTS = ("logits", "probabilities")

# Largest difference of an exported network's outputs from the trained network's, relative to the largest of
# these: the rounding of float32, whose sums are taken in another order.
TOLERANCE = 1e-4
BATCHES = (1, 64)  # images a call whose latency is measured
LICENCE = (
    "The code of darts_fast is under the MIT licence. The weights come from the data that they were trained "
    "on; whether its licence lets you use them and pass them on is for you to find out."
)


class Deployed(nn.Module):
    """A trained network with what stands before and behind it: images as they are -> logits or probabilities.

    Args:
        module: the network, which is copied, without its auxiliary head.
        mean, std: [channels], in pixel values, by which the images were normalised in training.
        dtype: of the images [N, channels, H, W]: "uint8", pixel values from 0 to 255, or "float32", the same
            divided by 255.
        output: "logits", or "probabilities" (their softmax), float32 [N, classes].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: DerivedNetwork, mean: Tensor, std: Tensor, dtype: str, output: str):
        super().__init__()
        self.dtype, self.output = dtype, output
        self.network = network(**{**module.arguments, "auxiliary": False})
        state = module.state_dict()
        self.network.load_state_dict({name: state[name] for name in self.network.state_dict()})
        for name, statistic in (("mean", mean), ("std", std)):
            self.register_buffer(name, statistic.float().view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        # Also of float32: an exported `to` refuses images of another dtype than it was exported with.
        images = images.to(torch.float32)
        if self.dtype == "float32":
            images = images * 255
        logits = self.network((images - self.mean) / self.std)
        return logits.softmax(dim=1) if self.output == "probabilities" else logits


def export(
    path: str | Path,
    formats: Sequence[str] = ("torch",),
    which: str = "final",
    dtype: str = "uint8",
    output: str = "logits",
    out: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Writes the network of a training as files that are used without the training, with their card.

    Args:
        path: the run folder of a training.
        formats: of "torch" (network.pt2, a program of `torch.export`), "onnx" (network.onnx) and
            "safetensors" (network.safetensors: the plain network, which `load_network` reads).
        which: "final", the network of the last epoch; "best", of the best one; "ema", the moving average.
        dtype, output: see `Deployed`, which "torch" and "onnx" export.
        out: the folder to write, a new one; None: exports/ and the name of the run.
        tell: is called with a line before each thing that takes time.

    Returns:
        The folder. In it are the files, card.md, card.json, and genotype.svg where Graphviz can draw it.

    Raises:
        InputError: there is no such run, network or format, a package is not installed, or `out` exists or
            cannot be written.
        RunError: an exported network computes something else than the trained one.
    """
    path, formats, tell = Path(path), tuple(dict.fromkeys(formats)), tell or (lambda line: None)
    choices: list[tuple[str, str, Iterable[str]]] = [("format", name, FORMATS) for name in formats]
    choices += [("which", which, SAVED), ("dtype", dtype, INPUTS), ("output", output, OUTPUTS)]
    for noun, value, known in choices:
        if value not in known:
            raise InputError(f"{noun} must be {' or '.join(known)}, not {value!r}")
    if not formats:
        raise InputError("no format was given")
    if formats == ("safetensors",) and (dtype, output) != ("uint8", "logits"):
        raise InputError(
            "input and output are for the formats torch and onnx: safetensors has the plain network"
        )
    for name in formats:
        missing = [package for package in FORMATS[name][1] if not _installed(package)]
        if missing:
            raise InputError(
                f"the format {name} needs what is not installed here: pip install {' '.join(missing)}"
            )
    trained = Trained.read(path, which)
    if trained.module.cell_noise:
        raise InputError(
            f"{path} cannot be exported: its cells have the operation noise, so no two calls give the same"
        )
    out = Path(FOLDER, trained.config.name) if out is None else Path(out)
    deployed = Deployed(trained.module, trained.content["mean"], trained.content["std"], dtype, output)
    with torch.no_grad(), within_quota(), writing(out):
        if os.path.lexists(out):
            raise InputError(f"{out} exists and is not overwritten; choose another --out")
        partial = out.with_name(f"{out.name}.partial")  # what is killed leaves this one
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _write(partial, formats, trained, deployed, tell)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out


class Trained(NamedTuple):
    """A network that a training saved."""

    config: TrainConfig
    environment: dict[str, str]  # in which the training began
    source: str  # name of the file
    module: DerivedNetwork
    content: dict[str, Any]  # of the file
    image_size: tuple[int, int]

    @classmethod
    def read(cls, path: Path, which: str) -> "Trained":
        """That of a run folder. Raises InputError."""
        config, environment_then = read_config(path, TrainConfig)
        source, why_not = SAVED[which]
        file = path / source
        if not os.path.lexists(file):
            raise InputError(f"{path} has no {source}: {why_not}")
        module, content = unpacked(file)
        try:
            check_keys(content["test"], ("epoch", "loss", "top1", "top5"), "test")
            check_number(content["test"]["epoch"], int, 1, 2**32, "test.epoch")
            for name in ("top1", "top5"):
                check_number(content["test"][name], float, 0, 1, f"test.{name}")
        except ValueError as error:
            raise InputError(f"{file} cannot be read as a trained network ({error})") from error
        size = content.get("image_size")
        if size is None:  # a file of before
            size = read_data(config, None, resumed=path).images.shape[2:]
        return cls(config, environment_then, source, module, content, tuple(size))

    def images(self, number: int, dtype: str) -> Tensor:
        """Random images as `Deployed` takes them."""
        shape = (number, self.module.arguments["image_channels"], *self.image_size)
        pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return pixels if dtype == "uint8" else pixels / 255


def _write(
    folder: Path,
    formats: tuple[str, ...],
    trained: Trained,
    deployed: Deployed,
    tell: Callable[[str], None],
) -> None:
    """Writes all files of an export into the folder."""
    images = trained.images(3, deployed.dtype)
    calls: dict[str, Callable[[Tensor], Tensor]] = {"eager": deployed}
    differences: dict[str, float | None] = {}
    files = {name: FORMATS[name][0] for name in formats}
    program = None
    if formats != ("safetensors",):
        tell("tracing the network")
        batch = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(deployed, (images,), dynamic_shapes=batch)
        for node in program.graph.nodes:  # where in this machine's files it was called, for each operation
            node.meta.pop("stack_trace", None)
    for name, file in files.items():
        tell(f"writing {file}")
        if name == "safetensors":
            write_atomically(folder / file, _safetensors(trained.content))
            _check_weights(folder / file, trained.module)
            continue
        assert program is not None
        write_atomically(folder / file, _pt2(program) if name == "torch" else _onnx(program, deployed.output))
        call = _loaded(folder / file)
        differences[name] = None if call is None else _difference(call(images), deployed(images), file)
        if call is not None:
            calls[name] = call
    milliseconds = {}
    for name, call in calls.items():
        tell(f"measuring the latency: {name}")
        milliseconds[name] = {
            str(number): _latency(call, trained.images(number, deployed.dtype)) for number in BATCHES
        }
    picture = None
    with suppress(ValueError, RuntimeError):  # there is no Graphviz, or the cells are too large for it
        svg = plot.render(plot.source(trained.module.arguments["genotype"]), "svg")
        picture = "genotype.svg"
        write_atomically(folder / picture, svg)
    card = _card(trained, deployed, files, picture)
    card |= {"largest_difference": differences}
    card |= {
        "latency": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "milliseconds": milliseconds,
        }
    }
    write_json(folder / "card.json", card)
    write_atomically(folder / "card.md", markdown(card).encode())


def _pt2(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, output: str) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=[output],
        dynamic_shapes={"images": {0: "batch"}},  # its name; it is dynamic in the program
    )
    assert exported is not None  # it is, with `dynamo`
    return exported.model_proto.SerializeToString()


def _safetensors(content: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(*as_safetensors(content))


def _check_weights(path: Path, module: DerivedNetwork) -> None:
    """Raises RunError unless the file is read back to the same bits."""
    found, own = unpacked(path)[0].state_dict(), module.state_dict()
    if not all(torch.equal(found[name], tensor) for name, tensor in own.items()):
        raise RunError(f"{path.name} was written, but read back with other weights; it is not kept")


def _loaded(path: Path) -> Callable[[Tensor], Tensor] | None:
    """The network of an exported file as a function of images; None where nothing installed here runs it."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if not _installed("onnxruntime"):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _difference(found: Tensor, expected: Tensor, file: str) -> float:
    """The largest absolute difference. Raises RunError where it is more than rounding, or no number."""
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:
        raise RunError(
            f"on random images {file} differs by {difference:.1e} from the trained network, whose outputs "
            f"are at most {largest:.1e}; it is not kept"
        )
    return difference


def _latency(call: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Milliseconds of a call: the median of five, or of as many as take half a second, after a warm-up."""
    call(images)
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.5:
        started = time.perf_counter()
        call(images)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def _card(trained: Trained, deployed: Deployed, files: dict[str, str], picture: str | None) -> dict[str, Any]:
    """The content of card.json but for what is measured; accuracies are from 0 to 1."""
    config, content, arguments = trained.config, trained.content, trained.module.arguments
    judged_by = "the test images"
    if config.train_portion < 1:
        judged_by = "the training images held out (the network was trained on the others)"
    shape = ["N", arguments["image_channels"], *trained.image_size]
    plain = list(files) == ["safetensors"]
    hidden = (*HIDDEN, "genotype")  # which the card says elsewhere
    settings = dataclasses.asdict(config).items()
    packages = {package for name in files for package in FORMATS[name][1]}
    packages |= {"onnxruntime"} if "onnx" in files and _installed("onnxruntime") else set()
    return {
        "files": files,
        "source": trained.source,
        "network": content["network"],
        "image_size": list(trained.image_size),
        "mean": content["mean"].tolist(),
        "std": content["std"].tolist(),
        "input": None
        if plain
        else {"name": "images", "dtype": deployed.dtype, "shape": shape, "values": INPUTS[deployed.dtype]},
        "output": {"name": deployed.output, "dtype": "float32", "shape": ["N", arguments["classes"]]},
        "data": {"name": config.dataset, "crc32": f"{content['data']:08x}"},
        "accuracy": {"images": judged_by, **content["test"], "seed": config.seed},
        "parameters": parameter_count(trained.module),
        "multiply_adds": multiply_adds(trained.module, *trained.image_size),
        "settings": {name: value for name, value in settings if name not in hidden and value is not None},
        "trained_with": trained.environment,
        "exported_with": environment("cpu") | {package: version(package) for package in sorted(packages)},
        "picture": picture,
        "licence": LICENCE,
    }


def main() -> None:
    refuse_ranks("a network is exported")
    parser = OneSentenceParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", metavar="DIR", help="the run folder of a training, such as augments/digits")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["torch"],
        help="one or more: torch, a program of torch.export; onnx; safetensors, the weights for load_network "
        "(default: torch)",
    )
    parser.add_argument(
        "--which",
        choices=SAVED,
        default="final",
        help="network of the last epoch, of the best one, or the moving average (default: final)",
    )
    parser.add_argument(
        "--input",
        choices=INPUTS,
        default="uint8",
        help="images that it takes: uint8, from 0 to 255, or float32, from 0 to 1 (default: uint8)",
    )
    parser.add_argument("--output", choices=OUTPUTS, default="logits", help="what it gives (default: logits)")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help=f"new folder to write (default: {FOLDER}/ and the name of the run)",
    )
    given = parser.parse_args()
    out = export(given.path, given.format, given.which, given.input, given.output, given.out, tell=_say_line)
    say(one_line(f"wrote {str(out)!r}: {', '.join(sorted(os.listdir(out)))}"))


def _say_line(line: str) -> None:
    say(f"{line} ...")


if __name__ == "__main__":
    sys.argv[0] = "python -m darts_fast.export"
    sys.exit(run_program(sys.argv[0], main))
