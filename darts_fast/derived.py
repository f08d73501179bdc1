"""The network of a genotype: what is trained once the search is over (arXiv 1806.09055, appendix A.1.2)."""

import copy
import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darts_fast.errors import InputError
from darts_fast.files import Unreadable, read_safetensors, read_tensors
from darts_fast.fused import FusedDerivedCells
from darts_fast.genotype import Gene, Genotype
from darts_fast.notation import load_genotype, parse
from darts_fast.reference import CellNoise, FactorizedReduce, operation, relu_conv_bn
from darts_fast.space import INPUTS, STEM_MULTIPLIER, reduction_layers
from darts_fast.state import check_keys, check_number, check_state

# By how much each stem and the two reduction cells divide an image's sides: they have to be divisible by it.
SIZE_MULTIPLE = {"cifar": 4, "imagenet": 32}
METADATA = "darts_fast"  # where a safetensors file has what is no tensor of the network
SAVED = ("network", "state_dict", "mean", "std", "data", "test")  # what a saved network's file holds
SMALLEST_FOR_AUXILIARY = 6  # side of the auxiliary head's input: two windows of 5 that are not the same


def network(
    genotype: Genotype | str | os.PathLike[str],
    classes: int = 10,
    channels: int = 36,
    layers: int = 20,
    image_channels: int = 3,
    stem: str = "cifar",
    auxiliary: bool = False,
    pool_batch_norm: bool = False,
    fused: bool = False,
) -> "DerivedNetwork":
    """The network of a genotype as a plain module: images [N, image_channels, H, W] -> logits [N, classes].

    Args:
        genotype: one, or what `load_genotype` reads: the name of a published one, a search's folder, ...
        channels: width of a node in the first cell; doubled by each of the two reduction cells. Even.
        layers: number of cells, at least 3; those at 1/3 and 2/3 of the depth halve the image.
        stem: "cifar" keeps the image's size (sides divisible by 4); "imagenet" divides it by 8 (by 32).
        auxiliary: with the auxiliary head. In training mode the module then returns (logits, auxiliary
            logits); the image behind the second reduction must be at least 6 x 6 (see `auxiliary_fits`).
        pool_batch_norm: a batch norm behind every pool, as in pt.darts; the official code has none.
        fused: compute the cells by `darts_fast.kernels`: the same function of the same parameters, faster.
            (Not in evaluation mode where gradients are wanted.) No part of a saved network.

    Raises:
        InputError: a size is other than that, a state is twice in a concat, or there is no such genotype.
    """
    if not isinstance(genotype, Genotype):
        genotype = load_genotype(genotype)
    for name, value, least in (("classes", classes, 1), ("image_channels", image_channels, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")
    if channels < 2 or channels % 2:
        raise InputError(f"channels must be an even number, at least 2, not {channels}")
    if layers < 3:
        raise InputError(f"layers must be at least 3, not {layers}")
    for concat in (genotype.normal_concat, genotype.reduce_concat):
        if len(set(concat)) < len(concat):
            raise InputError(f"a state is twice in the concat {list(concat)}")
    if stem not in SIZE_MULTIPLE:
        raise InputError(f"stem must be cifar or imagenet, not {stem!r}")
    return DerivedNetwork(
        genotype, classes, channels, layers, image_channels, stem, auxiliary, pool_batch_norm, fused
    )


def auxiliary_fits(height: int, width: int, stem: str) -> bool:
    """Whether images of this size are large enough, behind the second reduction, for the auxiliary head."""
    return min(height, width) // SIZE_MULTIPLE[stem] >= SMALLEST_FOR_AUXILIARY


def parameter_count(module: "DerivedNetwork") -> int:
    """Number of trained values without the auxiliary head's, as papers count them."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith("auxiliary_head."))


def multiply_adds(module: "DerivedNetwork", height: int, width: int) -> int:
    """Multiply-adds of the convolutions and linear layers for one image, in evaluation mode: what papers call
    mult-adds, +x or MACs. Nothing is computed: the shapes are followed on PyTorch's meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    module = copy.deepcopy(module).to("meta").eval()
    module.fused = False  # only PyTorch's own convolutions are counted
    module.noise_generator = None  # of another device
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(1, module.arguments["image_channels"], height, width, device="meta"))
    return counter.get_total_flops() // 2


def packed(
    module: "DerivedNetwork",
    mean: Tensor,
    std: Tensor,
    data: int,
    test: dict[str, float],
    image_size: tuple[int, int],
) -> dict[str, Any]:
    """What a saved network's file holds, as plain values and tensors on the host: see `load_network`.

    Args:
        mean, std: [image channels], in pixel values, by which the images were normalised.
        data: the checksum of the images it was trained and tested with.
        test: loss, top1 and top5 (0 to 1) on the test images, and the epoch.
        image_size: height and width of the images.
    """
    return {
        "network": {**module.arguments, "genotype": str(module.arguments["genotype"])},
        "state_dict": {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()},
        "mean": mean.double(),
        "std": std.double(),
        "data": data,
        "test": test,
        "image_size": list(image_size),
    }


def as_safetensors(content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `packed` gave, as the tensors and the metadata of a safetensors file: the state dict, and all else
    as JSON. `load_network` reads the file back to the same bits."""
    others = {name: value for name, value in content.items() if name != "state_dict"}
    others |= {name: content[name].tolist() for name in ("mean", "std")}
    # Of their own memory: a run's are views of one tensor, which the format refuses.
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in content["state_dict"].items()
    }
    return tensors, {"format": "pt", METADATA: json.dumps(others)}


def load_network(path: str | Path) -> "DerivedNetwork":
    """The network in a best.pt, final.pt or ema.pt of a training run, or in an exported network.safetensors,
    on the host, in evaluation mode.

    Its images must be normalised as in training: `torch.load(path)["mean"]` and `["std"]`, a value a channel,
    in pixel values from 0 to 255. (The card of an exported network has them, too.)

    Raises:
        InputError: the file is absent or is not such a file.
    """
    return unpacked(path)[0]


def unpacked(path: str | Path) -> tuple["DerivedNetwork", dict[str, Any]]:
    """The network in such a file, and all that the file holds. Raises InputError."""
    noun = "a trained network"
    try:
        content = _read(Path(path), noun)
        # Files of before have no size of the images.
        check_keys({"image_size": None} | content, (*SAVED, "image_size"), "it")
        module = _built(content["network"], content["state_dict"])
        statistic = torch.empty(module.arguments["image_channels"], dtype=torch.float64, device="meta")
        check_state(content["mean"], statistic, "mean")
        check_state(content["std"], statistic, "std")
        check_number(float(content["std"].min()), float, 1e-30, math.inf, "std")
        check_number(content["data"], int, 0, 2**32 - 1, "data")
        if "image_size" in content:
            sides = content["image_size"]
            if type(sides) is not list or len(sides) != 2:
                raise ValueError(f"image_size is {reprlib.repr(sides)}, no height and width")
            for side in sides:
                check_number(side, int, 1, 2**16, "image_size")
    except Unreadable as error:
        if not os.path.lexists(path):
            raise InputError(f"there is no file {path}") from None
        raise InputError(f"{path} {error}") from error
    except ValueError as error:
        raise InputError(f"{path} cannot be read as {noun} ({error})") from error
    return module.eval(), content


def _read(path: Path, noun: str) -> dict[str, Any]:
    """What such a file holds, not yet checked. Raises Unreadable and ValueError."""
    if path.suffix != ".safetensors":
        return read_tensors(path, noun)
    tensors, metadata = read_safetensors(path, noun)
    try:
        content = json.loads(metadata[METADATA])
        statistics = {
            name: torch.tensor([float(value) for value in content[name]], dtype=torch.float64)
            for name in ("mean", "std")
        }
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it has not the metadata of one") from error
    return content | statistics | {"state_dict": tensors}


def _built(arguments: Any, state: Any) -> "DerivedNetwork":
    """The network of a file's `network` with its `state_dict`; raises ValueError. Nothing is allocated before
    the tensors are known to be there."""
    sizes, flags = ("classes", "channels", "layers", "image_channels"), ("auxiliary", "pool_batch_norm")
    check_keys(arguments, (*sizes, *flags, "genotype", "stem"), "network")
    if not isinstance(state, dict):
        raise ValueError("state_dict is no dictionary")
    cells = {name.split(".")[1] for name in state if isinstance(name, str) and name.startswith("cells.")}
    for name in sizes:
        check_number(arguments[name], int, 1, len(cells) if name == "layers" else 2**24, f"network.{name}")
    for name, kind in [*((flag, bool) for flag in flags), ("genotype", str), ("stem", str)]:
        if type(arguments[name]) is not kind:
            raise ValueError(f"network.{name} is {reprlib.repr(arguments[name])}")
    with torch.device("meta"):
        module = network(**{**arguments, "genotype": parse(arguments["genotype"])})
    check_state(state, module.state_dict(), "state_dict")
    module.load_state_dict(dict(state), assign=True)
    return module


class DerivedNetwork(nn.Module):
    """Stem, cells, classifier, perhaps an auxiliary head: see `network`, which makes one.

    In training mode `drop_path_prob` is the probability with which each path of each image is dropped (a
    number; or a tensor, which may change under a captured step), and `drop_path_generator` (of the device;
    None: PyTorch's own) draws which. In both modes `noise_generator` (the same) is what the operation `noise`
    draws from, anew in every call.
    """

    _droppable: Tensor  # numbers of the edges that drop path drops, of all cells': int64

    def __init__(
        self,
        genotype: Genotype,
        classes: int,
        channels: int,
        layers: int,
        image_channels: int,
        stem: str,
        auxiliary: bool,
        pool_batch_norm: bool,
        fused: bool,
    ):
        super().__init__()
        self.fused = fused
        self.arguments: dict[str, Any] = {
            "genotype": genotype, "classes": classes, "channels": channels, "layers": layers,
            "image_channels": image_channels, "stem": stem, "auxiliary": auxiliary,
            "pool_batch_norm": pool_batch_norm,
        }  # fmt: skip
        self.drop_path_prob: float | Tensor = 0.0
        self.drop_path_generator: torch.Generator | None = None
        self.noise_generator: torch.Generator | None = None
        self._fused_cells: FusedDerivedCells | None = None  # made when they are needed
        if stem == "cifar":
            width = STEM_MULTIPLIER * channels
            self.stem = nn.Sequential(
                nn.Conv2d(image_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            )
        else:  # two stems: the first cell reads the image at a quarter and at an eighth of its size
            width = channels
            self.stem0 = nn.Sequential(
                nn.Conv2d(image_channels, width // 2, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(),
                nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
        before_previous, previous, previous_reduction = width, width, stem == "imagenet"
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in reduction_layers(layers)
            if reduction:
                channels *= 2
            cell = DerivedCell(
                genotype, before_previous, previous, channels, reduction, previous_reduction, pool_batch_norm
            )
            self.cells.append(cell)
            before_previous, previous, previous_reduction = previous, len(cell.concat) * channels, reduction
            if auxiliary and layer == reduction_layers(layers)[1]:
                self.auxiliary_head = AuxiliaryHead(previous, classes, last_batch_norm=stem == "cifar")
        self.classifier = nn.Linear(previous, classes)
        edges = [edge for cell in self.derived_cells() for edge in cell.edges]
        self._edges = len(edges)
        self.cell_noise = CellNoise(self.cells)
        # Those that drop path drops: never an identity (FractalNet's rule, kept by the official code).
        droppable = [i for i, edge in enumerate(edges) if not isinstance(edge, nn.Identity)]
        numbers = torch.tensor(droppable, dtype=torch.int64, device="cpu")  # also where all else is meta
        self.register_buffer("_droppable", numbers, persistent=False)

    def forward(
        self, images: Tensor, activations: torch.dtype | None = None, cells: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `network`.

        Args:
            activations: the type of what the cells compute, where it is not that of the weights (on kernels
                only); stem, heads and logits are of the weights' in any case.
            cells: the weights of all cells in a row, used in place of the parameters (on kernels only).
        """
        # The kernels have no derivatives in evaluation mode.
        on_kernels = self.fused and (self.training or not torch.is_grad_enabled())
        if on_kernels:  # which are channels-last; so is then everything from the stem on
            images = images.contiguous(memory_format=torch.channels_last)
        if self.arguments["stem"] == "cifar":
            inputs = [self.stem(images)]
        else:
            inputs = [self.stem0(images)]
            inputs.append(self.stem1(inputs[0]))
        wide = inputs[0].dtype
        with_auxiliary = self.training and self.arguments["auxiliary"]
        wanted = [reduction_layers(len(self.cells))[1]] if with_auxiliary else []
        wanted.append(len(self.cells) - 1)
        path_weights = None
        if self.training and (isinstance(self.drop_path_prob, Tensor) or self.drop_path_prob > 0):
            path_weights = self._path_weights(inputs[0])
        noise = self.cell_noise.draw(inputs[-1], self.noise_generator)
        if on_kernels:
            if cells is None:
                cells = torch.cat([p.flatten() for p in self.cells.parameters()])
            dtype = activations or wide
            inputs = [x.to(dtype) for x in inputs]
            found = self.cells_on_kernels()(inputs, cells, dtype, path_weights, wanted, noise)
        else:
            with self.cell_noise.placed(noise, inputs[-1]):
                found = self._computed_cells(inputs, path_weights, wanted)
        logits = self.classifier(found[-1].mean(dim=(2, 3), dtype=wide))
        return (logits, self.auxiliary_head(found[0].to(wide))) if with_auxiliary else logits

    def derived_cells(self) -> list["DerivedCell"]:
        """The cells, by their own type."""
        return [cast(DerivedCell, cell) for cell in self.cells]

    def cells_on_kernels(self) -> FusedDerivedCells:
        """The cells, computed by the kernels; from here on running statistics are views of common tensors."""
        if self._fused_cells is None:
            self._fused_cells = FusedDerivedCells(self.derived_cells())
        self._fused_cells.check_statistics()
        return self._fused_cells

    def _computed_cells(
        self, inputs: list[Tensor], path_weights: Tensor | None, wanted: list[int]
    ) -> list[Tensor]:
        """The outputs of the cells of these numbers, by the modules."""
        before_previous, previous = inputs[0], inputs[-1]
        found, first = [], 0
        for number, cell in enumerate(self.derived_cells()):
            edges = slice(first, first + len(cell.edges))
            output = cell(before_previous, previous, None if path_weights is None else path_weights[edges])
            before_previous, previous, first = previous, output, edges.stop
            if number in wanted:
                found.append(output)
        return found

    def _path_weights(self, like: Tensor) -> Tensor:
        """Drop path: what each edge of each image is multiplied by, [edges of all cells, N]: 0 with the
        probability of dropping, else scaled up for it; an identity by 1."""
        keep = 1.0 - self.drop_path_prob
        drawn = torch.rand(  # from 0 to below 1
            len(self._droppable), len(like), generator=self.drop_path_generator, device=like.device
        )
        weights = torch.ones(self._edges, len(like), dtype=like.dtype, device=like.device)
        # No copy but on the meta device, where this buffer of host numbers stays on the host.
        droppable = self._droppable.to(like.device)
        return weights.index_copy_(0, droppable, (drawn < keep).to(like.dtype) / keep)


class DerivedCell(nn.Module):
    """A cell of a genotype: each node is the sum of its operations, the output the concatenated nodes."""

    def __init__(
        self,
        genotype: Genotype,
        channels_before_previous: int,
        channels_previous: int,
        channels: int,
        reduction: bool,
        previous_reduction: bool,
        pool_batch_norm: bool,
    ):
        super().__init__()
        gene: Gene = genotype.reduce if reduction else genotype.normal
        self.reduction = reduction
        self.concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
        self.sources = [[source for _, source in node] for node in gene]
        self.preprocess0: nn.Module
        if previous_reduction:
            self.preprocess0 = FactorizedReduce(channels_before_previous, channels, affine=True)
        else:
            self.preprocess0 = relu_conv_bn(channels_before_previous, channels, affine=True)
        self.preprocess1 = relu_conv_bn(channels_previous, channels, affine=True)
        self.edges = nn.ModuleList(
            operation(name, channels, 2 if reduction and source < INPUTS else 1, True, pool_batch_norm)
            for node in gene
            for name, source in node
        )

    def forward(self, before_previous: Tensor, previous: Tensor, path_weights: Tensor | None) -> Tensor:
        """`path_weights` [edges, N] are what drop path multiplies each edge of each image by."""
        states = [self.preprocess0(before_previous), self.preprocess1(previous)]
        edges = iter(enumerate(self.edges))
        for sources in self.sources:
            paths = []
            for source in sources:
                number, edge = next(edges)
                path = edge(states[source])
                if path_weights is not None and not isinstance(edge, nn.Identity):
                    path = path * path_weights[number, :, None, None, None]
                paths.append(path)
            states.append(sum(paths[1:], start=paths[0]))
        return torch.cat([states[state] for state in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier on the output of the cell at 2/3 of the depth, for training only.

    [N, channels, H, W] with H and W at least 6 -> [N, classes]. The official code's for ImageNet lacks the
    last batch norm.
    """

    def __init__(self, channels: int, classes: int, last_batch_norm: bool):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            PoolTo2x2(),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if last_batch_norm else []),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class PoolTo2x2(nn.Module):
    """Averages four windows, one in each corner: of side 5, as in the official code (8 x 8) and in pt.darts
    (7 x 7), or half the image where that is larger, so that together they always cover it."""

    def forward(self, x: Tensor) -> Tensor:
        window = [max(5, math.ceil(side / 2)) for side in x.shape[2:]]
        stride = [side - length for side, length in zip(x.shape[2:], window, strict=True)]
        return F.avg_pool2d(x, window, stride)
