"""A function of tensors, captured as CUDA graphs and replayed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # calls before a capture: libraries and autograd set themselves up, kernels are compiled


class Captured:
    """Calls `function` on static buffers that each call's inputs are copied into. On CUDA the first call with
    a batch of some size captures it as a graph, and later calls with batches of that size replay the graph.

    Args:
        function: keyword tensors -> one tensor. It reads nothing back to the host, its shapes depend on
            those of its inputs alone, and what it changes stays where it is.
        inputs: the buffers by name, on the device. The first dimension of each is the largest batch.
        state: gives every tensor that the function changes, where calls before the capture leave no trace.
        graph: whether to capture (CUDA only). Otherwise `function` is called on the same buffers.
        generators: of the device, all that `function` draws random numbers from. A replay draws what a call
            would have drawn.

    A smaller batch (the last one of an epoch) takes the first places of the buffers. What is changed must not
    be replaced by other tensors after the first call.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        state: Callable[[], Sequence[Tensor]],
        graph: bool,
        generators: Sequence[torch.Generator] = (),
    ):
        self.function, self.inputs, self.state, self.generators = function, inputs, state, generators
        self.graph = graph
        # Each with its output, by the size of the whole batch
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # All graphs are captured on one stream, into one pool of memory: they never run side by side, and
        # nothing that one leaves in the pool is read after it but its output.
        self._stream_and_pool: tuple[torch.cuda.Stream, Any] | None = None

    def __call__(self, whole: int | None = None, **inputs: Tensor) -> Tensor:
        """The function's result, a tensor of its own.

        `whole` is the size of the batch of which the inputs are one process's part; None: they are all of it.
        It tells the graphs apart, so that all processes capture, and replay, in the same steps.
        """
        size = len(next(iter(inputs.values())))
        whole = size if whole is None else whole
        buffers = self._buffers(size)
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name], non_blocking=True)
        if not self.graph:
            return self.function(**buffers)
        if whole not in self._graphs:
            self._graphs[whole] = self._capture(size)
        graph, output = self._graphs[whole]
        graph.replay()
        return output.clone()

    def trial(self, use: Callable[[Callable[[], Tensor]], Any], size: int | None = None) -> Any:
        """Calls `use` with an uncaptured call on the buffers, puts every tensor and generator back, and
        returns what `use` returned. `size`: of the batch; None: the largest."""
        before = [tensor.detach().clone() for tensor in self.state()]
        drawn = [generator.get_state() for generator in self.generators]
        found = use(lambda: self.function(**self._buffers(size)))
        with torch.no_grad():
            for tensor, kept in zip(self.state(), before, strict=True):
                tensor.copy_(kept)
        for generator, kept in zip(self.generators, drawn, strict=True):
            generator.set_state(kept)
        return found

    def _buffers(self, size: int | None) -> dict[str, Tensor]:
        return {name: buffer[:size] for name, buffer in self.inputs.items()}

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        device = next(iter(self.inputs.values())).device
        # torch.cuda.graph waits for the current device, and would take its stream from it.
        with torch.cuda.device(device):
            if self._stream_and_pool is None:
                self._stream_and_pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            stream, pool = self._stream_and_pool
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self.trial(lambda step: [step() for _ in range(WARM_UPS)], size)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, pool=pool, stream=stream):  # records, and computes nothing
                output = self.function(**self._buffers(size))
        return graph, output


def in_words(captured: bool) -> str:
    """For the log."""
    if not captured:
        return "not captured as a CUDA graph"
    return "captured as one CUDA graph, with the augmentation"
