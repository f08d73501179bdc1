"""A function of tensors, captured as a CUDA graph and replayed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # calls before the capture: libraries and autograd set themselves up, kernels are compiled


class Captured:
    """Calls `function` on static buffers that each call's inputs are copied into; on CUDA the first call
    captures it as one graph, which later calls replay.

    Args:
        function: keyword tensors -> one tensor. It reads nothing back to the host, its shapes depend on
            those of its inputs alone, and what it changes stays where it is.
        inputs: the buffers by name, on the device.
        state: gives every tensor that the function changes, where calls before the capture leave no trace.
        graph: whether to capture (CUDA only). Otherwise `function` is called on the same buffers.
        generators: of the device, all that `function` draws random numbers from. A replay draws what a call
            would have drawn.

    Inputs of other shapes than the buffers' (the last batch of an epoch) are not copied: `function` is called
    on them as they are. What is changed must not be replaced by other tensors after the first call.
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
        self.graph = torch.cuda.CUDAGraph() if graph else None
        self.output: Tensor | None = None  # of the graph

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The function's result, a tensor of its own."""
        if any(inputs[name].shape != buffer.shape for name, buffer in self.inputs.items()):
            return self.function(**inputs)
        for name, buffer in self.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        if self.graph is None:
            return self.function(**self.inputs)
        if self.output is None:
            self._capture()
        self.graph.replay()
        return self.output.clone()

    def trial(self, use: Callable[[Callable[[], Tensor]], Any]) -> Any:
        """`use` of an uncaptured call on the buffers, of which no trace is left; what it returns."""
        before = [tensor.detach().clone() for tensor in self.state()]
        drawn = [generator.get_state() for generator in self.generators]
        found = use(lambda: self.function(**self.inputs))
        with torch.no_grad():
            for tensor, kept in zip(self.state(), before, strict=True):
                tensor.copy_(kept)
        for generator, kept in zip(self.generators, drawn, strict=True):
            generator.set_state(kept)
        return found

    def _capture(self) -> None:
        device = next(iter(self.inputs.values())).device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.trial(lambda step: [step() for _ in range(WARM_UPS)])
        torch.cuda.current_stream(device).wait_stream(stream)
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):  # records, and computes nothing
            self.output = self.function(**self.inputs)


def in_words(captured: bool) -> str:
    """For the log."""
    return "captured as one CUDA graph, with the augmentation" if captured else "not captured"
