"""The network of a genotype, against the official code's numbers and the published sizes."""

import copy
from statistics import median

import pytest
import torch
from conftest import Golden, relative_error

from darts_fast import Genotype, InputError, load_genotype, load_network, network
from darts_fast.derived import auxiliary_fits, multiply_adds, packed, parameter_count
from darts_fast.genotype import OPERATIONS
from darts_fast.interop import load_official_eval
from darts_fast.kernels import triton
from darts_fast.kernels.backends import using
from darts_fast.notation import NAMED, parse

EVAL_FILES = ("official_eval_v1_c4_l5.npz", "official_eval_v2_c4_l6.npz")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("file", EVAL_FILES)
def test_the_official_codes_logits(file, fused):
    """In training mode both heads', then in evaluation mode with the statistics that left behind.

    The file's logits of the training mode were computed in float32: the official code itself, run in float64,
    is up to 1.5e-5 from them (and, run beside ours, equal to ours in every bit).
    """
    golden = Golden(file)
    module = load_official_eval(golden.group("init", torch.float64), parse(golden.text("genotype")))
    module.fused = fused
    assert parameter_count(module) == golden.meta["params_without_aux"]
    assert sum(p.numel() for p in module.parameters()) == golden.meta["params"]
    images = golden["images"].double()
    logits, auxiliary_logits = module.train()(images)
    assert relative_error(logits, golden["train_logits"]) < 2e-5
    assert relative_error(auxiliary_logits, golden["train_logits_aux"]) < 2e-5
    with torch.no_grad():
        logits = module.eval()(images)
    assert relative_error(logits, golden["eval_logits_after_one_train_forward"]) < 1e-6


def test_published_sizes():
    """Table 1 of the paper: 3.3 M on CIFAR-10; table 3: 4.7 M on ImageNet. The official code's networks have
    exactly these numbers."""
    with torch.device("meta"):
        cifar = network(NAMED["DARTS_V2"], auxiliary=True)
        imagenet = network(NAMED["DARTS_V2"], 1000, 48, 14, stem="imagenet", auxiliary=True)
    assert parameter_count(cifar) == 3_349_342 and parameter_count(imagenet) == 4_718_752


def test_a_genotype_may_be_named_or_written_out():
    named, genotype = network("darts_v2", channels=4, layers=3), load_genotype("DARTS_V2")
    assert named.arguments["genotype"] == genotype
    assert network(str(genotype), channels=4, layers=3).arguments == named.arguments
    with pytest.raises(InputError, match="did you mean DARTS_V2"):
        network("DARTS_V3")


def test_multiply_adds_counted_by_hand():
    """One operation an edge whose work is known: output positions * weights that each of them meets."""
    node = [("sep_conv_3x3", 0), ("skip_connect", 1)]
    genotype = Genotype([node], [2], [node], [2])
    module = network(genotype, classes=7, channels=4, layers=3)  # normal, reduction, reduction
    stem = 64 * 27 * 12
    normal = 64 * (12 * 4 + 12 * 4) + 2 * 64 * (4 * 9 + 4 * 4)
    # The first half of the separable convolution strides; the skip is a factorized reduce.
    first = 64 * (12 * 8 + 4 * 8) + 2 * 16 * (8 * 9 + 8 * 8) + 16 * 8 * 8
    second = 16 * 4 * 16 + 16 * 8 * 16 + 2 * 4 * (16 * 9 + 16 * 16) + 4 * 16 * 16
    assert multiply_adds(module, 8, 8) == stem + normal + first + second + 16 * 7
    assert next(module.parameters()).device.type == "cpu"  # the module itself stays where it is


WITHOUT_NOISE = tuple(name for name in OPERATIONS if name != "noise")


def every_operation(names=OPERATIONS):
    """A genotype with each operation in a normal and in a reduction cell, on a state of either kind."""
    gene = [[(name, number % 2), (name, number)] for number, name in enumerate(names)]
    every_node = list(range(2, 2 + len(gene)))
    return Genotype(gene, every_node, gene, every_node)


@pytest.mark.parametrize(
    ("stem", "height", "width"), [("cifar", 8, 12), ("cifar", 32, 32), ("imagenet", 64, 96)]
)
def test_every_operation_and_stem(stem, height, width):
    module = network(every_operation(WITHOUT_NOISE), 5, 4, 3, image_channels=2, stem=stem)
    logits = module.train()(torch.randn(3, 2, height, width))
    assert type(logits) is torch.Tensor and logits.shape == (3, 5)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    module.eval()
    images = torch.randn(3, 2, height, width)
    assert torch.allclose(module(images)[1:2], module(images[1:2]), atol=1e-5)  # images do not mix


@pytest.mark.parametrize("name", NAMED)
def test_every_published_genotype(name):
    module = network(NAMED[name], 10, 4, 3, auxiliary=True)
    logits, auxiliary_logits = module(torch.randn(2, 3, 32, 32))
    assert logits.shape == auxiliary_logits.shape == (2, 10)
    assert module.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_auxiliary_head_needs_room():
    smallest = {"cifar": 24, "imagenet": 192}
    for size, stem, fits in [(s + d, stem, not d) for stem, s in smallest.items() for d in (-4, 0)]:
        assert auxiliary_fits(size, size, stem) == fits and auxiliary_fits(size, 512, stem) == fits
    module = network(NAMED["DARTS_V2"], 10, 4, 3, auxiliary=True)
    for size in ((24, 24), (28, 40), (32, 32), (64, 96)):
        assert module(torch.randn(2, 3, *size))[1].shape == (2, 10)


def test_the_auxiliary_head_sees_every_pixel_of_a_large_image():
    from darts_fast.derived import PoolTo2x2

    for side in range(6, 20):
        x = torch.ones(1, 1, side, side, requires_grad=True)
        out = PoolTo2x2()(x)
        assert out.shape == (1, 1, 2, 2)
        out.sum().backward()
        corners = x.grad[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners > 0).all() and (side < 10 or (x.grad > 0).all())
    eight = torch.randn(1, 1, 8, 8)
    assert torch.equal(PoolTo2x2()(eight), torch.nn.AvgPool2d(5, stride=3)(eight))


def test_drop_path_drops_images_and_keeps_the_mean():
    """Of each edge by itself; the identity's is always 1."""
    node = [("sep_conv_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 0)]
    module = network(Genotype([node], [2], [node], [2]), 3, 4, 3).train()
    module.drop_path_prob, module.drop_path_generator = 0.3, torch.Generator().manual_seed(0)
    images = torch.zeros(4000, 12, 1, 1)
    found = module._path_weights(images)
    assert found.shape == (9, 4000) and (found[1] == 1).all()  # the reduction cells' skips are none
    dropping = torch.cat([found[:1], found[2:]])
    kept = dropping > 0
    assert torch.equal(dropping, kept / torch.tensor(0.7))  # scaled
    assert ((kept.float().mean(1) - 0.7).abs() < 0.03).all()
    assert (kept.float().corrcoef() - torch.eye(8)).abs().max() < 0.1


def test_drop_path_spares_identities_and_evaluation():
    """With every path dropped, what is left of a cell of two skips is what a cell without drop path gives."""
    identity = [[("skip_connect", 0), ("skip_connect", 1)]]
    module = network(Genotype(identity, [2], identity, [2]), 3, 4, 3).train()
    module.drop_path_generator = torch.Generator().manual_seed(0)
    seen = []
    module.cells[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    images = torch.randn(6, 3, 8, 8)
    plain = module(images)
    module.drop_path_prob = 0.9
    other = module(images)  # the reduction cells' skips are factorized reduces: dropped
    assert torch.equal(seen[0], seen[1]) and not torch.equal(plain, other)
    module.eval()
    assert torch.equal(module(images), module(images))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"channels": 5}, "channels must be an even number"),
        ({"channels": 0}, "channels must be an even number"),
        ({"layers": 2}, "layers must be at least 3"),
        ({"classes": 0}, "classes must be at least 1"),
        ({"image_channels": 0}, "image_channels must be at least 1"),
        ({"stem": "mnist"}, "stem must be cifar or imagenet"),
    ],
)
def test_bad_sizes(sizes, sentence):
    with pytest.raises(InputError, match=sentence):
        network(NAMED["DARTS_V2"], **sizes)


def test_a_saved_network_is_the_same_network(tmp_path):
    module = network(NAMED["NASNet"], 4, 6, 3, image_channels=1, auxiliary=True, pool_batch_norm=True).eval()
    content = packed(module, torch.ones(1), torch.ones(1), 5, {"top1": 0.5}, (32, 32))
    torch.save(content, tmp_path / "final.pt")
    loaded = load_network(tmp_path / "final.pt")
    images = torch.randn(2, 1, 32, 32)
    assert not loaded.training and torch.equal(loaded(images), module(images))
    assert loaded.arguments == module.arguments
    whole = (tmp_path / "final.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-100])
    for name, sentence in [
        ("cut.pt", "cannot be read as a trained network"),
        ("none.pt", "there is no file"),
    ]:
        with pytest.raises(InputError, match=sentence) as error:
            load_network(tmp_path / name)
        assert "\n" not in str(error.value)


def test_fused_is_the_same_network():
    """Every operation, both stems, pools with and without batch norm, drop path and auxiliary head: logits,
    every gradient and running statistics in float64, then evaluation mode."""
    for stem, side, pool_batch_norm in (("cifar", 24, True), ("imagenet", 192, False)):
        torch.manual_seed(0)
        plain, fused = (
            network(every_operation(), 5, 4, 3, 3, stem, True, pool_batch_norm, fused=fused).double().train()
            for fused in (False, True)
        )
        for module in plain.modules():  # gamma and beta of which one channel is off and one is negative
            if isinstance(module, torch.nn.BatchNorm2d) and module.num_features == 4:
                torch.nn.init.normal_(module.bias)
                module.weight.data.copy_(torch.tensor([0.0, -0.5, 1.5, 1.0]))
        fused.load_state_dict(plain.state_dict())
        assert list(plain.state_dict()) == list(fused.state_dict())
        assert "fused" not in fused.arguments
        images, found = torch.randn(3, 3, side, side, dtype=torch.float64), []
        for module in (plain, fused):
            module.drop_path_prob, module.drop_path_generator = 0.3, torch.Generator().manual_seed(1)
            module.noise_generator = torch.Generator().manual_seed(2)
            outputs = module(images)
            (outputs[0].square().sum() + outputs[1].sum()).backward()
            module.eval()
            found.append([*outputs, *(p.grad for p in module.parameters()), module(images)])
            found[-1] += [t.double() for t in module.state_dict().values()]
        assert len(found[0]) == len(found[1])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm()
        assert multiply_adds(plain, side, side) == multiply_adds(fused, side, side)


def test_noise_is_drawn_in_every_call_and_dropped_as_a_path():
    """Also in evaluation, as in RobustDARTS's code; the network's own generator draws it."""
    node = [("noise", 0), ("skip_connect", 1)]
    module = network(Genotype([node], [2], [node], [2]), 3, 4, 3).train()
    module.drop_path_prob = 0.5
    kept = module._path_weights(torch.zeros(400, 12, 1, 1))
    assert ((kept[0] > 0).float().mean() - 0.5).abs() < 0.1 and (kept[1] == 1).all()
    module.drop_path_prob, images, seen = 0.0, torch.randn(8, 3, 8, 8), []
    for edge, side in zip((module.cells[0].edges[0], module.cells[1].edges[0]), (8, 4), strict=True):
        edge.register_forward_hook(lambda *of_call, side=side: seen.append((of_call[2], side)))
    for training in (True, False):
        module.train(training)
        module.noise_generator = torch.Generator().manual_seed(0)
        first, second = module(images), module(images)
        module.noise_generator = torch.Generator().manual_seed(0)
        assert not torch.equal(first, second) and torch.equal(module(images), first)
    for drawn, side in seen:
        assert drawn.shape[2:] == (side, side) and drawn.std().item() == pytest.approx(1, abs=0.1)
        assert drawn.mean().abs() < 0.1
    assert not torch.equal(seen[0][0], seen[2][0])


@pytest.mark.usefixtures("no_overflow_checks")
def test_fused_is_the_same_network_on_triton():
    """What a CUDA device computes, under the interpreter: one of each kind of operation, against float64;
    with float16 activations within that type's rounding, every gradient in float32. (Where the rounding
    crosses a kink, a gradient moves by much more: plain autocast's by 0.39 of the images of seed 0.)"""
    normal = [[("sep_conv_3x3", 0), ("max_pool_3x3", 1)]]
    reduce = [[("dil_conv_5x5", 0), ("skip_connect", 1)], [("avg_pool_3x3", 0), ("conv_7x1_1x7", 2)]]
    genotype, errors = Genotype(normal, [2], reduce, [2, 3]), []
    variants = [
        (False, torch.float64, None),
        (True, torch.float64, None),
        (True, torch.float32, torch.float16),
    ]
    for seed in range(3):
        generator, found = torch.Generator().manual_seed(seed), []
        images = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=generator)
        for fused, dtype, activations in variants[:: 2 if seed else 1]:  # once in float64
            torch.manual_seed(seed)
            module = network(genotype, 5, 4, 3, 1, pool_batch_norm=True, fused=fused).to(dtype)
            module.drop_path_prob, module.drop_path_generator = 0.2, torch.Generator().manual_seed(seed)
            with using(triton):
                logits = module(images.to(dtype), activations)
                gradients = torch.autograd.grad(logits.square().sum(), list(module.parameters()))
            assert all(g.dtype == dtype for g in gradients)
            found.append([logits, torch.cat([g.flatten() for g in gradients]), *module.buffers()])
        plain, *exact, half = found
        assert all(relative_error(*pair) < 1e-9 for one in exact for pair in zip(one, plain, strict=True))
        errors.append([relative_error(*pair) for pair in zip(half, plain, strict=True)])
    assert all(median(of_one) < 0.05 for of_one in zip(*errors, strict=True)), errors


def test_fused_convolutions_and_pools_run_on_kernels(monkeypatch):
    """No 1x1 or depthwise convolution and no pool of a cell is left to PyTorch's modules."""
    module = network(NAMED["DARTS_V2"], 10, 4, 3, fused=True)
    for layer in module.cells.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d)):
            monkeypatch.setattr(layer, "forward", None)
    module(torch.randn(2, 3, 8, 8))


def test_fused_refuses_batch_norms_in_different_modes():
    module = network(NAMED["DARTS_V2"], 10, 4, 3, fused=True).train()
    module.cells[1].preprocess0.eval()
    with pytest.raises(RuntimeError, match="all be in training mode or all in evaluation mode"):
        module(torch.randn(2, 3, 8, 8))


def test_fused_drops_paths_beside_frozen_batch_norms():
    """The network in training mode, its cells' batch norms in evaluation mode."""
    torch.manual_seed(0)
    plain, fused = (network(NAMED["DARTS_V2"], 10, 4, 3, fused=f).double().train() for f in (False, True))
    fused.load_state_dict(plain.state_dict())
    images, found = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    for module in (plain, fused):
        for norm in module.cells.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.eval()
        module.drop_path_prob, module.drop_path_generator = 0.5, torch.Generator().manual_seed(1)
        with torch.no_grad():
            found.append(module(images))
    assert relative_error(found[1], found[0]) < 1e-9


def test_fused_follows_its_buffers():
    """Running statistics that were moved, copied or loaded anew are those that are updated and used."""
    torch.manual_seed(0)
    plain, fused = (network(NAMED["DARTS_V2"], 10, 4, 3, fused=f).train() for f in (False, True))
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8)
    plain(images), fused(images)
    plain, fused = plain.double(), copy.deepcopy(fused).double()
    fused.load_state_dict({name: t.clone() for name, t in plain.state_dict().items()}, assign=True)
    plain(2 * images.double()), fused(2 * images.double())
    found = fused.state_dict()
    for name, expected in plain.state_dict().items():
        assert relative_error(found[name], expected) < 1e-9 or not expected.any(), name
    with torch.no_grad():
        assert relative_error(fused.eval()(images.double()), plain.eval()(images.double())) < 1e-9


def test_fused_is_trained_after_an_evaluation_in_inference_mode():
    """Which makes the running statistics one tensor, that the training updates."""
    torch.manual_seed(0)
    plain, fused = (network(NAMED["DARTS_V2"], 10, 4, 3, fused=f).double() for f in (False, True))
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        fused.eval()(images)
    plain.train()(images), fused.train()(images).sum().backward()
    expected = dict(plain.named_buffers())
    for name, found in fused.named_buffers():
        assert torch.equal(found, expected[name]) or relative_error(found, expected[name]) < 1e-9, name


def test_fused_has_no_second_derivative():
    module = network(NAMED["DARTS_V2"], 10, 4, 3, fused=True)
    loss = module(torch.randn(2, 3, 8, 8)).sum()
    gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in gradients).backward()
