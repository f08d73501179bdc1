"""Mixes, batch norms, tensors that several nodes read, and sums of tensors, see `types.Backend`."""

from collections.abc import Sequence

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import Launch, Table, image, numbers, pixels, reader, rows, tensors_in
from darts_fast.kernels.types import Reader, SecondReader, Source

# A node


def mix_forward(candidates: Sequence[Source], weights: Tensor, *, outs: Sequence[Tensor]) -> list[Launch]:
    return [_mix("mix_forward", "mix_forward", candidates, weights, outs=outs)]


def mix_backward(
    candidates: Sequence[Source], adjoint: Tensor, *, sums: Tensor, weight_gradient: Tensor
) -> list[Launch]:
    return [
        _mix(
            "mix_backward",
            "mix_backward",
            candidates,
            adjoint=adjoint,
            sums=sums,
            weight_gradient=weight_gradient,
        )
    ]


def mix_tangent(
    candidates: Sequence[Source],
    weights: Tensor,
    tangents: Sequence[Tensor],
    adjoint: Tensor,
    sums: Tensor,
    *,
    outs: Sequence[Tensor],
    tangent_sums: Tensor,
    weight_gradient: Tensor,
) -> list[Launch]:
    return [
        _mix(
            "mix_tangent",
            "mix_tangent",
            candidates,
            weights,
            tangents,
            adjoint,
            outs,
            sums,
            tangent_sums,
            weight_gradient,
        )
    ]


def mix_second(
    candidates: Sequence[Source],
    adjoint: Tensor,
    gradient_before: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor,
) -> list[Launch]:
    return [
        _mix(
            "mix_second",
            "mix_backward",
            candidates,
            adjoint=adjoint,
            sums=sums,
            weight_gradient=weight_gradient,
            gradient_before=gradient_before,
        )
    ]


# Batch norm: a mix of one candidate, whose weight is 1


def norm_forward(sources: Sequence[Source], *, out: Tensor) -> list[Launch]:
    return [
        _mix("norm_forward", "mix_forward", [source], outs=[h]) for source, h in zip(sources, out, strict=True)
    ]


def norm_backward(sources: Sequence[Source], adjoints: Sequence[Tensor], *, sums: Tensor) -> list[Launch]:
    return [
        _mix("norm_backward", "mix_backward", [source], adjoint=adjoints[i], sums=sums[:, i : i + 1])
        for i, source in enumerate(sources)
    ]


def norm_tangent(
    sources: Sequence[Source],
    tangents: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    *,
    out: Tensor,
    sums: Tensor,
) -> list[Launch]:
    return [
        _mix(
            "norm_tangent",
            "mix_tangent",
            [source],
            tangents=[tangents[i]],
            adjoint=adjoints[i],
            outs=[out[i]],
            tangent_sums=sums[:, i : i + 1],
        )
        for i, source in enumerate(sources)
    ]


def _mix(
    name: str,
    function: str,
    candidates: Sequence[Source],
    weights: Tensor | None = None,
    tangents: Sequence[Tensor] | None = None,
    adjoint: Tensor | None = None,
    outs: Sequence[Tensor] = (),
    sums: Tensor | None = None,
    tangent_sums: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    gradient_before: Tensor | None = None,
) -> Launch:
    """`sums` [2, candidates, C] and `tangent_sums` [4, candidates, C] are read or written."""
    n, c, height, width = candidates[0].x.shape
    of_candidates = Table(
        [
            table.Candidate(
                y=image(candidate.x),
                statistics=rows(candidate.statistics),
                weight=0 if weights is None else numbers(weights[k]),
                tangent=0 if tangents is None else image(tangents[k]),
            )
            for k, candidate in enumerate(candidates)
        ]
    )
    of_outs = Table([pixels(out) for out in outs])
    call = table.Mix(
        candidates=of_candidates.address,
        count=of_candidates.count,
        m=n * height * width,
        c=c,
        adjoint=table.Matrix() if adjoint is None else pixels(adjoint),
        outs=of_outs.address,
        n_outs=of_outs.count,
        sums=rows(None if sums is None else sums.view(len(sums), -1)),
        tangent_sums=rows(None if tangent_sums is None else tangent_sums.view(len(tangent_sums), -1)),
        weight_gradient=numbers(weight_gradient),
        gradient_before=numbers(gradient_before),
    )
    given = candidates, weights, tangents, adjoint, outs, sums, tangent_sums, weight_gradient, gradient_before
    return Launch(name, list(tensors_in(given)), function, Table([call]), [of_candidates, of_outs])


# Tensors that several nodes read


def fan_out_backward(
    sources: Sequence[Source], readers: Sequence[Sequence[Reader]], *, out: Tensor
) -> list[Launch]:
    return _fan_out("fan_out_backward", sources, readers, out)


def fan_out_second(
    sources: Sequence[Source], readers: Sequence[Sequence[SecondReader]], *, out: Tensor
) -> list[Launch]:
    return _fan_out("fan_out_second", sources, readers, out)


def _fan_out(
    name: str, sources: Sequence[Source], readers: Sequence[Sequence[Reader | SecondReader]], out: Tensor
) -> list[Launch]:
    of_readers = [Table([reader(read) for read in of_source]) for of_source in readers]
    shared = [
        table.Shared(y=image(source.x), readers=of_source.address, n_readers=of_source.count, out=image(adjoint))
        for source, of_source, adjoint in zip(sources, of_readers, out, strict=True)
    ]
    of_shared = Table(shared)
    call = table.FanOut(of_shared.address, of_shared.count, out[0].numel() // out.shape[2], out.shape[2])
    tensors = list(tensors_in([readers, out]))
    return [Launch(name, tensors, name, Table([call]), [of_shared, *of_readers])]


def add(terms: Sequence[Tensor], *, out: Tensor) -> list[Launch]:
    of_terms = Table([pixels(term) for term in terms])
    call = table.Sum(of_terms.address, of_terms.count, image(out), out.numel() // out.shape[1], out.shape[1])
    return [Launch("add", [*terms, out], "add", Table([call]), [of_terms])]
