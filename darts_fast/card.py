"""The card of an exported network: what it computes, what it was trained on and with, how it is called."""

from typing import Any

from darts_fast.tables import markdown_table

# A format: what its file needs, and a call of it.
USES = {
    "torch": (
        "`{file}` is a program of `torch.export` for the CPU; it needs PyTorch alone.",
        """import torch

network = torch.export.load("{file}").module()
images = torch.zeros({shape}, dtype=torch.{dtype})  # yours
with torch.no_grad():
    {output} = network(images)""",
    ),
    "onnx": (
        "`{file}` needs a runtime of ONNX, such as onnxruntime.",
        """import numpy
import onnxruntime

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
images = numpy.zeros({shape}, dtype=numpy.{dtype})  # yours
[{output}] = session.run(None, {{"images": images}})""",
    ),
    "safetensors": (
        "`{file}` has the weights, and what darts_fast makes the network from. Its network is the plain one: "
        "it takes images that are normalised, and gives logits.",
        """import torch

from darts_fast import load_network

network = load_network("{file}")  # a torch.nn.Module, in evaluation mode
mean = torch.tensor({mean}).view(-1, 1, 1)  # in pixel values, a number a channel
std = torch.tensor({std}).view(-1, 1, 1)
images = torch.zeros({shape}, dtype=torch.uint8)  # yours, from 0 to 255
with torch.no_grad():
    logits = network((images.float() - mean) / std)""",
    ),
}
TIMED = {"eager": "PyTorch, eager", "torch": "`torch.export`", "onnx": "ONNX Runtime"}


def markdown(card: dict[str, Any]) -> str:
    """card.md, from the content of card.json (see `darts_fast.export`)."""
    network, data, accuracy, output = card["network"], card["data"], card["accuracy"], card["output"]
    lines = [
        f"# A network for {data['name']}",
        "",
        "A classifier of images: the network of a genotype, as "
        "[DARTS](https://arxiv.org/abs/1806.09055) searches them, trained and exported by darts_fast.",
        "",
        *markdown_table(
            (f"top-1 accuracy on {accuracy['images']}", f"**{100 * accuracy['top1']:.2f} %**"),
            [
                (f"top-5 accuracy on {accuracy['images']}", f"{100 * accuracy['top5']:.2f} %"),
                ("epoch", f"{accuracy['epoch']} of {card['settings']['epochs']} (`{card['source']}`)"),
                ("seed", accuracy["seed"]),
                ("parameters", f"{card['parameters']:,}"),
                ("multiply-adds an image (convolutions and classifier)", f"{card['multiply_adds']:,}"),
                ("cells; channels of the first; stem", "; ".join(str(network[name]) for name in SIZES)),
                ("data set", data["name"]),
                ("CRC-32 of its images and labels", data["crc32"]),
            ],
        ),
        "",
    ]
    if card["source"] == "best.pt":
        lines += [
            "The epoch was chosen by this very accuracy, which is therefore a little too good: that of the "
            "last epoch, of `final.pt`, is the number to report.",
            "",
        ]
    lines += ["## Use", ""]
    images = card["input"]
    if images is not None:  # of the formats that have the normalisation inside
        sizes = ", ".join(map(str, images["shape"][1:]))
        lines += [
            f"Input: `images`, {images['dtype']} [N, {sizes}] (images, channels, height, width; N is free), "
            f"{images['values']}; they are normalised inside. Output: `{output['name']}`, float32 "
            f"[N, {output['shape'][1]}].",
            "",
        ]
    for name, file in card["files"].items():
        need, call = USES[name]
        filled = {
            "file": file,
            "shape": (7, network["image_channels"], *card["image_size"]),
            "dtype": images and images["dtype"],
            "output": output["name"],
            "mean": card["mean"],
            "std": card["std"],
        }
        lines += [need.format(**filled), "", "```python", call.format(**filled), "```", ""]
    for name, difference in card["largest_difference"].items():
        file = f"`{card['files'][name]}`"
        if difference is None:
            lines.append(f"{file} was not compared with the trained network: onnxruntime is not installed.")
        elif difference == 0:
            lines.append(f"On random images {file} gives the bits of the trained network.")
        else:
            lines.append(
                f"On random images the {output['name']} of {file} differ from those of the trained network "
                f"by {difference:.1e} at most."
            )
        lines.append("")
    latency = card["latency"]
    batches = list(latency["milliseconds"]["eager"])
    lines += [
        "## Latency",
        "",
        f"Milliseconds a call, the median of several; {latency['processor']}, threads: {latency['threads']}.",
        "",
        *markdown_table(
            ("images a call", *batches),
            (
                (TIMED[name], *(f"{times[batch]:.3g}" for batch in batches))
                for name, times in latency["milliseconds"].items()
            ),
        ),
        "",
        "## Genotype",
        "",
        "```",
        network["genotype"],
        "```",
        "",
    ]
    if card["picture"]:
        lines += [f"![The normal and the reduction cell]({card['picture']})", ""]
    then, now = card["trained_with"], card["exported_with"]
    lines += [
        "## Training",
        "",
        "The settings of `run_from.py`:",
        "",
        *markdown_table(("setting", "value"), card["settings"].items()),
        "",
        *markdown_table(
            ("environment", "of the training", "of the export"),
            ((name, then.get(name, ""), now.get(name, "")) for name in then | now),
        ),
        "",
        "## Licence",
        "",
        card["licence"],
    ]
    return "\n".join(lines) + "\n"


SIZES = ("layers", "channels", "stem")
