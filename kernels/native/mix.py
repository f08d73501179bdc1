"""Mixes, batch norms, tensors that several nodes read, and sums of tensors, see `types.Backend`."""

from collections.abc import Sequence

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import Launch, Table, image, numbers, pixels, read_of, reader, rows
from darts_fast.kernels.types import Reader, SecondReader, Source, tensors

# A node


def mix_forward(candidates: Sequence[Source], weights: Tensor, *, outs: Sequence[Tensor]) -> list[Launch]:
    return [_mix("mix_forward", candidates, weights, outs=outs)]


def mix_backward(
    candidates: Sequence[Source], adjoint: Tensor, *, sums: Tensor, weight_gradient: Tensor
) -> list[Launch]:
    return [_mix("mix_backward", candidates, adjoint=adjoint, sums=sums, weight_gradient=weight_gradient)]


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
    reads = candidates, weights, tangents, adjoint
    return [_mix("mix_tangent", *reads, outs, sums, tangent_sums, weight_gradient)]


def mix_second(
    candidates: Sequence[Source],
    adjoint: Tensor,
    gradient_before: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor,
) -> list[Launch]:
    gradients = {"weight_gradient": weight_gradient, "gradient_before": gradient_before}
    return [_mix("mix_second", candidates, adjoint=adjoint, sums=sums, **gradients)]


# Batch norm: a mix of one candidate, whose weight is 1


def norm_forward(sources: Sequence[Source], *, out: Tensor) -> list[Launch]:
    return [_mix("norm_forward", [source], outs=[h]) for source, h in zip(sources, out, strict=True)]


def norm_backward(sources: Sequence[Source], adjoints: Sequence[Tensor], *, sums: Tensor) -> list[Launch]:
    return [
        _mix("norm_backward", [source], adjoint=adjoints[i], sums=sums[:, i : i + 1])
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
        _mix("norm_tangent", [source], None, [yd], g, [hd], tangent_sums=sums[:, i : i + 1])
        for i, (source, yd, g, hd) in enumerate(zip(sources, tangents, adjoints, out, strict=True))
    ]


def _mix(
    name: str,
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
    """What a function does not take is None."""
    n, c, height, width = candidates[0].x.shape
    of_candidates = Table(
        [
            table.Candidate(
                y=image(candidate.x),
                statistics=rows(candidate.statistics),
                weight=numbers(None if weights is None else weights[k]),
                tangent=image(tangents and tangents[k]),
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
        adjoint=pixels(adjoint),
        outs=of_outs.address,
        n_outs=of_outs.count,
        sums=rows(sums if sums is None else sums.view(len(sums), -1)),
        tangent_sums=rows(tangent_sums if tangent_sums is None else tangent_sums.view(len(tangent_sums), -1)),
        weight_gradient=numbers(weight_gradient),
        gradient_before=numbers(gradient_before),
    )
    written = outs, sums, tangent_sums, weight_gradient
    found = list(tensors([candidates, weights, tangents, adjoint, gradient_before, written]))
    return Launch(name, found, Table([call]), [of_candidates, of_outs])


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
    of_shared = Table(
        [
            table.Shared(image(source.x), of_source.address, of_source.count, image(adjoint))
            for source, of_source, adjoint in zip(sources, of_readers, out, strict=True)
        ]
    )
    c = out.shape[2]
    call = table.FanOut(of_shared.address, of_shared.count, m=out[0].numel() // c, c=c)
    read = [read_of(read) for of_source in readers for read in of_source]
    return [Launch(name, list(tensors([read, out])), Table([call]), [of_shared, *of_readers])]


def add(terms: Sequence[Tensor], *, out: Tensor) -> list[Launch]:
    of_terms, c = Table([pixels(term) for term in terms]), out.shape[1]
    call = table.Sum(of_terms.address, of_terms.count, image(out), m=out.numel() // c, c=c)
    return [Launch("add", [*terms, out], Table([call]), [of_terms])]
