"""Search spaces other than the paper's: on the kernels as in textbook PyTorch, derived, read, searched."""

import functools
import json

import pytest
import torch
from conftest import relative_error

from darts_fast import InputError, SearchConfig, architect
from darts_fast.genotype import derive
from darts_fast.space import CANDIDATES, DARTS, Space
from darts_fast.spaces import SPACES, read_space, written_out
from darts_fast.supernet import Supernet

pytestmark = pytest.mark.usefixtures("no_heat_maps")

UNEVEN = Space(  # one node, two; an edge of skips alone, one of a single pool, a kernel of 7
    normal=(
        ("skip_connect",), ("max_pool_3x3",),
        ("none", "dil_conv_3x3"), ("none", "avg_pool_3x3", "sep_conv_7x7"), ("skip_connect", "sep_conv_3x3"),
    ),
    reduce=(("skip_connect",),) * 5,
    nodes=2,
)  # fmt: skip
ALL = {**SPACES, "uneven": UNEVEN}


def pair(space, dtype=torch.float64):
    torch.manual_seed(0)
    networks = [Supernet(4, 5, 3, fused=fused, space=space).to(dtype) for fused in (False, True)]
    networks[1].load_state_dict(networks[0].state_dict())
    with torch.no_grad():
        for network in networks:
            for name, alphas in network.alphas().items():
                torch.manual_seed(len(name))
                alphas.normal_()
    return networks


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=generator),
        torch.randint(5, (3,), generator=generator),
    )


@pytest.mark.parametrize("name", ["s1", "s3", "uneven"])
def test_the_kernels_compute_what_the_reference_does(name):
    """Loss, both gradients and the second-order gradient; nothing for what an edge does not have."""
    found = []
    for network in pair(ALL[name]):
        weights, alphas = {"weights": network.flat_weights}, network.alphas()
        loss = network.loss(*batch(0), weights, alphas)
        first = torch.autograd.grad(loss, [*weights.values(), *alphas.values()])
        losses = [functools.partial(network.loss, *batch(i)) for i in range(2)]
        step = architect.VirtualStep(0.025, 0.9, 3e-4)
        second = architect.second_order_exact(*losses, weights, alphas, {}, step)
        found.append([loss, *first, *second.values()])
        for gradients in (first[1:], second.values()):
            for gradient, present in zip(gradients, ALL[name].present(), strict=True):
                assert not gradient[~torch.tensor(present)].any() and gradient.isfinite().all()
    for fused, reference in zip(found[1], found[0], strict=True):
        assert relative_error(fused, reference) < 1e-9 or not (fused.any() or reference.any())


def test_the_second_order_is_the_numerical_derivative():
    """d/da L_val(w - lr grad L_train(w, a), a) in the space S3."""
    network, _ = pair(SPACES["s3"])
    weights, alphas = {"weights": network.flat_weights}, network.alphas()
    losses = [functools.partial(network.loss, *batch(i)) for i in range(2)]
    step = architect.VirtualStep(0.01, 0.9, 3e-4)
    exact = architect.second_order_exact(*losses, weights, alphas, {}, step)["alphas_normal"]

    def after(shift):
        moved = {**alphas, "alphas_normal": alphas["alphas_normal"].detach() + shift}
        leaf = architect.leaves(weights)
        ahead = step(leaf, architect.gradients(losses[0](leaf, moved), leaf), {})
        return losses[1](ahead, moved)

    torch.manual_seed(1)
    direction = torch.randn_like(exact)
    size = 1e-6  # small enough for no kink on the way
    numerical = (after(size * direction) - after(-size * direction)) / (2 * size)
    assert relative_error(numerical.detach(), (exact * direction).sum()) < 1e-5


def test_probabilities_are_of_the_edges_own_candidates():
    network = Supernet(2, 3, 3, space=UNEVEN)
    with torch.no_grad():
        network.alphas_normal.normal_()
        normal, reduce = network.probabilities()
    for row, alphas, names in zip(normal, network.alphas_normal, UNEVEN.normal, strict=True):
        own = [UNEVEN.candidates.index(name) for name in names]
        assert torch.allclose(row[own], alphas[own].softmax(0)) and row.sum().item() == pytest.approx(1)
    assert reduce[:, UNEVEN.candidates.index("skip_connect")].eq(1).all()


def test_derive_takes_only_what_an_edge_has():
    for rule in ("softmax", "raw"):
        for space in ALL.values():
            network = Supernet(2, 3, 3, space=space)
            for seed in range(5):
                torch.manual_seed(seed)
                alphas = []
                for name in network.ALPHAS:
                    torch.nn.init.normal_(getattr(network, name))
                    alphas.append(network.present(network.alphas())[name])
                genotype = derive(*alphas, rule, space)
                kinds = ((genotype.normal, space.normal), (genotype.reduce, space.reduce))
                for gene, candidates in kinds:
                    by_edge = dict(zip(space.edges, candidates, strict=True))
                    assert len(gene) == space.nodes
                    for node, pairs in enumerate(gene):
                        assert len(pairs) == 2
                        assert all(name != "none" and name in by_edge[source, node] for name, source in pairs)


def test_the_named_spaces():
    assert read_space("darts") == DARTS and DARTS.candidates == tuple(CANDIDATES)
    assert {len(names) for names in SPACES["s1"].normal + SPACES["s1"].reduce} == {2}
    assert SPACES["s2"].candidates == ("skip_connect", "sep_conv_3x3")
    assert SPACES["s3"].candidates == ("none", "skip_connect", "sep_conv_3x3")
    for space in ALL.values():
        assert read_space(written_out(space)) == space


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must have nodes, normal and reduce"),
        ('{"nodes": 1', "cannot be read as JSON"),
        ({"nodes": 9}, "nodes must be a whole number from 1 to 8, not 9"),
        ({"normal": []}, "normal must be a list of operations, or a list of 2 such lists"),
        ({"reduce": [["skip_connect"]]}, "a list of 2 such lists, one an edge"),
        (
            {"normal": ["sep_conv_9x9"]},
            "normal, edge 0: 'sep_conv_9x9' is no candidate; known: none, max_pool",
        ),
        ({"normal": [["skip_connect"], ["none"]]}, "edge 1 needs a candidate other than none"),
        ({"normal": ["skip_connect", "skip_connect"]}, "edge 0 must be a list of different operations"),
        ({"normal": [["skip_connect"], [3]]}, "edge 1: 3 is no candidate"),
        ({"normal": ["conv_7x1_1x7"]}, "'conv_7x1_1x7' is no candidate"),
    ],
)
def test_what_is_no_space_is_refused(content, said, tmp_path):
    if isinstance(content, dict):
        content = json.dumps({"nodes": 1, "normal": ["skip_connect"], "reduce": ["skip_connect"]} | content)
    (tmp_path / "space.json").write_text(content)
    with pytest.raises(InputError, match="space.json") as caught:
        read_space(str(tmp_path / "space.json"))
    assert said in str(caught.value)
    if content.startswith("{") and content.endswith("}"):  # written out, in place of the file
        with pytest.raises(InputError) as caught:
            read_space(content)
        assert said in str(caught.value) and "no JSON" not in str(caught.value)


def test_a_space_written_out_that_is_no_json_is_refused():
    with pytest.raises(InputError, match=r"^space is no JSON \(Unterminated string"):
        read_space('{"nodes')


def test_a_search_in_a_space_of_ones_own_needs_its_file_no_more(in_tmp, resumed_like_undisturbed):
    """Fused, stopped in its first step and resumed to the same bits."""
    file = in_tmp / "mine.json"
    file.write_text(json.dumps({"nodes": 2, "normal": UNEVEN.normal, "reduce": UNEVEN.reduce}))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = images, torch.arange(24) % 3
    config = SearchConfig(space=str(file), epochs=2, init_channels=2, layers=3, batch_size=6, fused=True)
    whole, resumed = resumed_like_undisturbed(config, data, 1, file.unlink)
    assert resumed[:4] == whole[:4] and len(whole.genotype.normal) == 2
