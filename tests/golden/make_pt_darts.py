"""Writes pt_darts.json with pt.darts's own code: python tests/golden/make_pt_darts.py CHECKOUT_OF_PT_DARTS"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [sys.argv[1], str(HERE.parent)]

import genotypes  # noqa: E402  of pt.darts
from conftest import synthetic_state  # noqa: E402
from models.augment_cnn import AugmentCNN  # noqa: E402
from models.search_cnn import SearchCNNController  # noqa: E402

GENOTYPE = (
    "Genotype(normal=[[('max_pool_3x3', 0), ('avg_pool_3x3', 1)], "
    "[('skip_connect', 0), ('sep_conv_3x3', 2)], "
    "[('sep_conv_5x5', 1), ('sep_conv_7x7', 2)], [('dil_conv_3x3', 3), ('dil_conv_5x5', 4)]], "
    "normal_concat=range(2, 6), "
    "reduce=[[('max_pool_3x3', 0), ('avg_pool_3x3', 1)], [('skip_connect', 0), ('sep_conv_3x3', 1)], "
    "[('max_pool_3x3', 2), ('sep_conv_5x5', 0)], [('dil_conv_3x3', 1), ('skip_connect', 3)]], "
    "reduce_concat=range(2, 6))"
)


def record(module: torch.nn.Module, size: int, seed: int) -> dict:
    """Shapes of the state; logits in training mode, then in evaluation mode with the statistics that left."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    module.double().load_state_dict(synthetic_state(shapes, seed))
    images = torch.from_numpy(np.random.RandomState(seed).standard_normal((3, 2, size, size)))
    outputs = []
    with torch.no_grad():
        for mode in (True, False):
            found = module.train(mode)(images)
            found = found if isinstance(found, tuple) else (found,)
            outputs.append([logits.tolist() for logits in found if logits is not None])
    return {"seed": seed, "size": size, "shapes": shapes, "train": outputs[0], "eval": outputs[1]}


def main() -> None:
    search = SearchCNNController(2, 4, 5, 3, torch.nn.CrossEntropyLoss(), device_ids=[0])
    augment = AugmentCNN(28, 2, 4, 5, 4, True, genotypes.from_str(GENOTYPE))
    content = {
        "meta": "pt.darts (github.com/khanrc/pt.darts), float64, 2 image channels, 4 channels, 5 classes",
        "genotype": GENOTYPE,
        "search": record(search, 16, 1),
        "augment": record(augment, 28, 2),
    }
    (HERE / "pt_darts.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
