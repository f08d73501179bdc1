"""That a step can be captured as a CUDA graph, shown without one."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL_SPACE, same, two_nodes
from test_derived import every_operation
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from darts_fast.capture import Captured
from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.data import from_tensors
from darts_fast.kernels import aten as aten_backend
from darts_fast.kernels.backends import using
from darts_fast.precision import strict_float32
from darts_fast.search import Search
from darts_fast.search_step import SearchStep
from darts_fast.space import CANDIDATES
from darts_fast.spaces import read_space
from darts_fast.supernet import Supernet
from darts_fast.traffic import Traffic
from darts_fast.train import Training

aten = torch.ops.aten
HOST_READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.allclose,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
    aten.lift_fresh,  # torch.tensor(a number): a copy from the host
}


EVERY_CANDIDATE = two_nodes(list(CANDIDATES))


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a value is read by the host or comes from it, and where a shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in HOST_READS, f"{func} in a step that is to be captured"
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a shape that depends on values"
        return func(*args, **(kwargs or {}))


def stepper(space=SMALL_SPACE, **settings):
    torch.manual_seed(0)
    config = SearchConfig(fused=True, **settings)
    return SearchStep(Supernet(4, 5, 3, fused=True, space=read_space(space)), config)


def batches(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for half in ("train", "validation"):
        found[f"{half}_images"] = torch.randn(size, 3, 8, 8, generator=generator)
        found[f"{half}_labels"] = torch.randint(5, (size,), generator=generator)
    return found


SETTINGS = [
    {},
    {"amp_dtype": "bfloat16"},
    {"amp_dtype": "float16"},
    {"order": 1},
    {"hvp": "finite-difference"},
    {"beta_decay": 3.0, "amp_dtype": "float16"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_reads_nothing_back(settings):
    step = stepper(EVERY_CANDIDATE, **settings)
    with using(aten_backend), NothingFromTheHost():
        step.take(**batches(1))


def test_the_mode_sees_what_it_is_for():
    x = torch.ones(3)
    for read in (
        x.sum().item,
        lambda: x[x > 0],
        x.nonzero,
        lambda: bool(x[0] > 0),
        lambda: torch.tensor(1.0),
    ):
        with pytest.raises(AssertionError), NothingFromTheHost():
            read()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_that_a_step_changes_moves(settings):
    step = stepper(**settings)
    tracked = [step.lr, step.network.flat_weights.grad, *(a.grad for a in step.alphas.values())]
    tracked += step.tensors()
    before = [t.data_ptr() for t in tracked]
    values = [t.clone() for t in step.tensors()]
    for seed in range(3):
        step.take(**batches(seed))
    after = [step.lr, step.network.flat_weights.grad, *(a.grad for a in step.alphas.values())]
    assert before == [t.data_ptr() for t in [*after, *step.tensors()]]
    # and `tensors` are all that changes: what is put back there, is put back
    with torch.no_grad():
        for tensor, value in zip(step.tensors(), values, strict=True):
            tensor.copy_(value)
    assert same(step.state_dict(), stepper(**settings).state_dict())


def test_buffers_stay_and_each_call_sees_new_data():
    step, plain = stepper(), stepper()
    buffers = {name: torch.zeros_like(tensor) for name, tensor in batches(0).items()}
    seen = []

    def function(**inputs):
        seen.append({name: tensor.data_ptr() for name, tensor in inputs.items()})
        return step.take(**inputs)

    captured = Captured(function, buffers, step.tensors, graph=False)
    for seed in (1, 2, 3):
        assert torch.equal(captured(**batches(seed)), plain.take(**batches(seed)))
    assert all(addresses == {n: t.data_ptr() for n, t in buffers.items()} for addresses in seen)
    # a smaller batch takes the first places of the same buffers
    for size in (2, 4):
        inputs = batches(4, size)
        assert torch.equal(captured(**inputs), plain.take(**inputs))
    assert seen[-1] == seen[-2] == seen[0]
    with pytest.raises(RuntimeError, match="must match"):
        captured(**batches(4, 5))
    assert same(step.state_dict(), plain.state_dict())


# Whole steps of both programs, from images as they are stored


def images(kind, seed, size=4, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    side = 8 if kind == "search" else 24  # which the auxiliary head needs
    found = torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    return found.to(device), torch.randint(5, (size,), generator=generator).to(device)


def loop(kind, device="cpu", space=SMALL_SPACE, **settings):
    """A search or a training in its second epoch: with crop, flip and cutout; a training also with every
    operation, auxiliary head and drop path."""
    pixels, labels = images(kind, 0, 16)
    labels[0] = 4  # so that there are five classes
    common = {"init_channels": 2, "layers": 3, "batch_size": 4, "epochs": 2, "cutout_length": 6}
    common |= {"device": device, "fused": True, **settings}
    if kind == "search":
        found = Search(SearchConfig(space=space, **common), from_tensors(pixels, labels))
    else:
        config = TrainConfig(genotype=every_operation(), drop_path_prob=0.6, **common)
        found = Training(config, from_tensors(pixels, labels, pixels, labels))
        assert found.auxiliary == (config.aux_weight > 0)
        found.train_step.set_average_share(5)
    found.epoch = 1
    found.begin_epoch()
    return found


def inputs(kind, seed, size=4, device="cpu"):
    names = ("train_", "validation_") if kind == "search" else ("",)
    pairs = [images(kind, seed + i, size, device) for i in range(len(names))]
    return {
        n + what: t
        for n, pair in zip(names, pairs, strict=True)
        for what, t in zip(("images", "labels"), pair, strict=True)
    }


def changed(found):
    """Every tensor and generator that a step changes or that is changed under it."""
    if isinstance(found, Search):
        step = found.search_step
        weights, generators, more = [step.network.flat_weights, *step.alphas.values()], [], []
        if "noise" in found.config.space:
            generators = [step.network.noise_generator]
    else:
        step, network = found.train_step, found.network
        weights, generators, more = (
            [step.weights],
            [network.drop_path_generator, network.noise_generator],
            [network.drop_path_prob, step.average_share],
        )
    return [*step.tensors(), step.lr, *(w.grad for w in weights), *more], [found.augmentation, *generators]


WHOLE = [
    ("search", {}),
    ("search", {"amp_dtype": "float16"}),
    ("training", {}),
    ("training", {"amp_dtype": "bfloat16"}),
    ("training", {"amp_dtype": "float16"}),
    ("training", {"aux_weight": 0.0, "ema": 0.9}),
    ("search", {"space": two_nodes(["sep_conv_3x3", "noise"])}),
]


@pytest.mark.parametrize(("kind", "settings"), WHOLE, ids=str)
def test_a_whole_step_reads_nothing_back(kind, settings):
    found = loop(kind, **{"space": EVERY_CANDIDATE} | settings)
    with using(aten_backend), NothingFromTheHost():
        found._take(**inputs(kind, 1))


@pytest.mark.parametrize(("kind", "settings"), WHOLE, ids=str)
def test_nothing_that_a_whole_step_changes_moves(kind, settings):
    found = loop(kind, **settings)
    tensors, generators = changed(found)
    addresses = [t.data_ptr() for t in tensors]
    before = [t.clone() for t in tensors]
    state = found.state()
    state = {**copy.deepcopy(state), "augmentation": found.augmentation.get_state()}
    found.take.trial(lambda _: [found.take(**inputs(kind, seed)) for seed in range(3)])
    assert addresses == [t.data_ptr() for t in changed(found)[0]]
    assert any(not torch.equal(t, b) for t, b in zip(tensors, before, strict=True))  # the gradients
    assert same({**found.state(), "augmentation": found.augmentation.get_state()}, state)
    assert list(found.take.generators) == generators


@pytest.mark.parametrize(("kind", "settings"), [*WHOLE[1:3], *WHOLE[5:]], ids=str)
def test_a_trial_leaves_no_trace(kind, settings):
    found, other = loop(kind, **settings), loop(kind, **settings)
    average = None if kind == "search" else found.train_step.average
    before = [] if average is None else [t.clone() for t in average.parameters()]
    moved = []

    def trial(step):
        for _ in range(2):
            step()
        moved.extend(
            not torch.equal(a, b) for a, b in zip(before, average.parameters(), strict=True) if average
        )

    found.take.trial(trial if before else lambda step: [step() for _ in range(2)])
    assert any(moved) == bool(before)
    for seed in (2, 3):
        assert torch.equal(*(f.take(**inputs(kind, seed)) for f in (found, other)))
    assert same(found.state(), other.state())


def test_the_traffic_of_a_step_is_said():
    """By ATen's kernels; what is counted of the C++ ones is in test_native.py."""
    found, given = loop("training"), inputs("training", 1)
    with using(aten_backend):
        found._take(**given)  # which makes what is made once
        with Traffic() as counted:
            found._take(**given)
        launches, moved = counted.total
        assert found.traffic() == f"{launches:,} launches, {moved / 1e9:.3g} GB read and written"
    assert launches > 1000 and moved > 1e6


@pytest.mark.parametrize(("kind", "settings"), WHOLE[:3], ids=str)
def test_a_step_draws_its_augmentation_and_drop_path_anew(kind, settings):
    """On the same images, with nothing learned, the loss is another in each step, and the same from the same
    seeds."""
    losses = []
    for _ in range(2):
        found = loop(kind, **settings)
        for _ in range(3):
            with torch.no_grad():
                before = [t.clone() for t in found.take.state()]
            losses.append(float(found.take(**inputs(kind, 1))[0]))
            with torch.no_grad():
                for tensor, kept in zip(found.take.state(), before, strict=True):
                    tensor.copy_(kept)
    assert losses[:3] == losses[3:] and len(set(losses)) == 3


def test_what_an_epoch_sets_is_seen_by_the_same_step():
    """The learning rate and the drop-path probability reach a step through tensors that stay."""
    found, alike = loop("training"), loop("training")
    take, probability = found.take, found.network.drop_path_prob
    assert float(probability) == pytest.approx(0.3)
    found.epoch = 0
    found.begin_epoch()
    assert found.take is take and found.network.drop_path_prob is probability and float(probability) == 0
    found.train_step.lr.fill_(0.0)
    before = found.train_step.parameters[0].clone()
    without, dropped = (float(f.take(**inputs("training", 1))[0]) for f in (found, alike))
    assert without != dropped
    assert torch.equal(found.train_step.parameters[0], before)
    assert not torch.equal(alike.train_step.parameters[0], before)


class Moves(TorchDispatchMode):
    """Fails where a tensor is copied, to another device or not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (aten._to_copy, aten.copy_), f"{func} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["search", "training"])
def test_a_step_moves_no_order_to_the_device(kind):
    """Moved from the host's own memory, it would wait for the device. Meta tensors stand in for a device."""
    settings = {} if kind == "search" else {"aux_weight": 0.0}  # the auxiliary head takes no batch of one
    found, picked = loop(kind, batch_size=3, **settings), []
    batches = found.batches
    batches.device = torch.device("meta")
    batches.images, batches.labels = batches.images.to("meta"), batches.labels.to("meta")
    found.take = lambda whole, **inputs: picked.append(
        {name: (t.device.type, len(t)) for name, t in inputs.items()}
    )
    found.begin_epoch()
    with Moves():
        for step in range(found.steps_per_epoch):
            found.step = step
            found.take_step(0.1)
    assert picked[0] == dict.fromkeys(inputs(kind, 0), ("meta", 3))
    assert {size for _, size in picked[-1].values()} == {2 if kind == "search" else 1}


# Graphs without CUDA


class Tape(TorchDispatchMode):
    """A graph that records the operations under way, and replays them: each is computed again, into the
    tensors that it gave."""

    def __init__(self):
        super().__init__()
        self.calls, self.generators, self.replays = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not func.is_view:  # a view stays one of the same memory
            self.calls.append((func, args, kwargs, tree_leaves(found)))
        return found

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, found in self.calls:
            for tensor, again in zip(found, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(again, torch.ScriptObject) and hasattr(again, "wait"):
                    again.wait()  # of an all-reduce, whose caller has waited when it was recorded
                elif isinstance(tensor, torch.Tensor) and tensor is not again:
                    tensor.copy_(again)


class Driver:
    """What `Captured` calls of torch.cuda, on the CPU: a graph is a `Tape`, and what is computed while it
    records leaves no trace in `tensors` and `generators`."""

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            assert other.device == self.device

    def __init__(self, monkeypatch, tensors, generators):
        self.tensors, self.generators, self.graphs, self.places = tensors, generators, [], []
        self.devices, self.default = [], self.Stream(torch.device("cpu"))
        for name in "CUDAGraph Stream current_stream device graph graph_pool_handle stream".split():
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def CUDAGraph(self):
        self.graphs.append(Tape())
        return self.graphs[-1]

    def current_stream(self, device):
        assert device == self.default.device
        return self.default

    @contextmanager
    def device(self, device):
        self.devices.append(device)
        yield
        self.devices.pop()

    def graph_pool_handle(self):
        return object()

    def stream(self, stream):
        return self.device(stream.device)

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        assert self.devices == [torch.device("cpu")] == [stream.device], "captured for another device"
        assert graph.generators == self.generators
        self.places.append((pool, stream))
        before = [t.detach().clone() for t in self.tensors], [g.get_state() for g in self.generators]
        with graph:
            yield
        with torch.no_grad():
            for tensor, kept in zip(self.tensors, before[0], strict=True):
                tensor.copy_(kept)
        for generator, kept in zip(self.generators, before[1], strict=True):
            generator.set_state(kept)


@pytest.mark.parametrize(
    ("kind", "settings"), [("search", {"amp_dtype": "float16", "order": 1}), *WHOLE[5:]], ids=str
)
def test_each_batch_size_is_captured_once(kind, settings, monkeypatch):
    """Two epochs, each of which ends in a smaller batch: as many graphs as batch sizes, replayed to the bits
    of uncaptured steps; on the device of the buffers, in one pool of memory."""
    with using(aten_backend):
        plain, captured = (loop(kind, batch_size=3, **settings) for _ in range(2))
        tensors, generators = changed(captured)
        driver = Driver(monkeypatch, tensors, generators)
        captured.take.graph, values = True, []
        for epoch in range(2):
            for found in (plain, captured):
                found.epoch, found.step = epoch, 0
                found.begin_epoch()
            for step in range(plain.steps_per_epoch):
                plain.step = captured.step = step
                (one, images), (two, _) = (found.take_step(0.1) for found in (plain, captured))
                values.append((one, two))
            assert images == (2 if kind == "search" else 1)  # of 8, and of 16
            assert [graph.replays for graph in driver.graphs] == [(epoch + 1) * step, epoch + 1]
    assert all(torch.equal(one, two) for one, two in values)  # no step has written over another's
    assert same(*({**f.state(), "augmentation": f.augmentation.get_state()} for f in (plain, captured)))
    assert driver.places[0] == driver.places[1] and not driver.devices


def test_a_step_of_the_warm_up_is_captured_apart(monkeypatch):
    """The second epoch of the warm-up and the two after it: two graphs each of the weight step alone and of
    the whole step, by batch size, replayed to the bits of uncaptured steps. The strength of Beta-DARTS's
    penalty reaches them."""
    settings = {"alpha_warmup": 2, "epochs": 4, "beta_decay": 40.0, "order": 1}
    with using(aten_backend):
        plain, captured = (loop("search", batch_size=3, **settings) for _ in range(2))
        driver = Driver(monkeypatch, *changed(captured))
        captured.take.graph = captured.warm_up.graph = True
        start = copy.deepcopy(plain.search_step.alphas)
        for epoch, replays in ((1, [2, 1]), (2, [2, 1, 2, 1]), (3, [2, 1, 4, 2])):
            for found in (plain, captured):
                found.epoch, found.step = epoch, 0
                found.begin_epoch()
                assert float(found.search_step.beta) == 10 * epoch
            for step in range(plain.steps_per_epoch):
                plain.step = captured.step = step
                assert torch.equal(*(found.take_step(0.1)[0] for found in (plain, captured)))
            assert [graph.replays for graph in driver.graphs] == replays
            moved = [not torch.equal(start[name], a) for name, a in plain.search_step.alphas.items()]
            assert moved == [epoch > 1] * 2 and (captured.warm_up is None) == (epoch > 1)
            assert same(*({**f.state(), "a": f.augmentation.get_state()} for f in (plain, captured)))


# A graph is captured and replayed by the CUDA driver.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "settings"), WHOLE, ids=str)
def test_whole_steps_captured_and_uncaptured_give_the_same_bits(kind, settings):
    """Random numbers included; smaller batches, captured too, between two replays."""
    found = [loop(kind, "cuda", "darts", no_graph=no_graph, **settings) for no_graph in (True, False)]
    with strict_float32():
        for seed, size in enumerate([4, 4, 2, 4, 2, 4]):
            given = inputs(kind, seed, size, "cuda")
            one, two = (f.take(**given) for f in found)
            assert torch.equal(one, two), f"step {seed}: {one.tolist()} uncaptured, {two.tolist()} captured"
    assert same(*({**f.state(), "augmentation": f.augmentation.get_state()} for f in found))


# On a machine with one device there is no second one whose current stream and allocator could be confused
# with the first one's.
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_is_captured_on_a_device_that_is_not_the_current_one():
    plain, captured = loop("search", "cuda:1", no_graph=True), loop("search", "cuda:1")
    assert torch.cuda.current_device() == 0
    with strict_float32():
        for seed, size in enumerate([4, 2, 4]):
            given = inputs("search", seed, size, "cuda:1")
            assert torch.equal(plain.take(**given), captured.take(**given))


# A graph is captured and replayed by the CUDA driver.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_and_uncaptured_give_the_same_bits(settings):
    plain, captured = stepper("darts", **settings), stepper("darts", **settings)
    plain, captured = (SearchStep(s.network.to("cuda"), s.config) for s in (plain, captured))
    buffers = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in batches(0).items()}
    take = Captured(captured.take, buffers, captured.tensors, graph=True)
    with strict_float32():
        for seed, size in enumerate([4, 4, 2, 4, 2]):
            inputs = {name: tensor.cuda() for name, tensor in batches(seed, size).items()}
            assert torch.equal(take(**inputs), plain.take(**inputs))
    assert same(captured.state_dict(), plain.state_dict())
