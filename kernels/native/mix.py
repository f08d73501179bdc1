"""Mixes, batch norms, tensors that several nodes read, and sums of tensors, see `types.Backend`."""

from collections.abc import Sequence

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import (
    Launch,
    Table,
    image,
    numbers,
    pixels,
    read_of,
    reader,
    rows,
    weight,
)
from darts_fast.kernels.types import Reader, SecondReader, Source, tensors

# A node


def mix_forward(
    candidates: Sequence[Source], weights: Tensor | None, *, outs: Sequence[Tensor]
) -> list[Launch]:
    return [_mix("mix_forward", candidates, weights, outs=outs)]


def mix_backward(
    candidates: Sequence[Source],
    weights: Tensor | None,
    adjoint: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor | None,
) -> list[Launch]:
    return [
        _mix("mix_backward", candidates, weights, adjoint=adjoint, sums=sums, weight_gradient=weight_gradient)
    ]


def mix_tangent(
    candidates: Sequence[Source],
    weights: Tensor,
    tangents: Sequence[Tensor],
    tangent_sums: Tensor | None,
    adjoint: Tensor,
    *,
    outs: Sequence[Tensor],
    products: Tensor,
) -> list[Launch]:
    # Adjoint and products are for the candidates without statistics.
    some = any(candidate.statistics is None for candidate in candidates)
    return [
        _mix(
            "mix_tangent",
            candidates,
            weights,
            tangents,
            adjoint if some else None,
            outs,
            tangent_sums=tangent_sums,
            products=products if some else None,
        )
    ]


def mix_second(
    candidates: Sequence[Source],
    adjoint: Tensor,
    first_sums: Tensor,
    tangent_sums: Tensor | None,
    products: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor,
) -> list[Launch]:
    return [
        _mix(
            "mix_second",
            candidates,
            adjoint=adjoint,
            sums=sums,
            first_sums=first_sums,
            tangent_sums=tangent_sums,
            products=products,
            weight_gradient=weight_gradient,
        )
    ]


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
    sums: Tensor,
    *,
    out: Tensor,
) -> list[Launch]:
    return [
        _mix("norm_tangent", [source], tangents=[yd], outs=[hd], tangent_sums=sums[:, i : i + 1])
        for i, (source, yd, hd) in enumerate(zip(sources, tangents, out, strict=True))
    ]


def _mix(
    name: str,
    candidates: Sequence[Source],
    weights: Tensor | None = None,
    tangents: Sequence[Tensor] | None = None,
    adjoint: Tensor | None = None,
    outs: Sequence[Tensor] = (),
    sums: Tensor | None = None,
    first_sums: Tensor | None = None,
    tangent_sums: Tensor | None = None,
    products: Tensor | None = None,
    weight_gradient: Tensor | None = None,
) -> Launch:
    """The launch of the C++ function of this name, which reads only what is not None."""
    n, c, height, width = candidates[0].x.shape
    of_candidates = Table(
        [
            table.Candidate(
                y=image(candidate.x),
                statistics=rows(candidate.statistics),
                affine=rows(candidate.affine),
                weight=weight(weights, k),
                tangent=image(tangents[k] if tangents else None),
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
        pixels=height * width,
        adjoint=pixels(adjoint),
        outs=of_outs.address,
        n_outs=of_outs.count,
        sums=_sums(sums),
        first_sums=_sums(first_sums),
        tangent_sums=_sums(tangent_sums),
        products=numbers(products),
        weight_gradient=numbers(weight_gradient),
    )
    # The tangent of a candidate without statistics is that of h: y is not read.
    read = [source for source in candidates if tangents is None or source.statistics is not None]
    reads = read, weights, tangents, adjoint, first_sums, tangent_sums, products
    found = list(tensors([reads, outs, sums, weight_gradient]))
    return Launch(name, found, Table([call]), [of_candidates, of_outs])


def _sums(sums: Tensor | None) -> table.Matrix:
    return rows(None if sums is None else sums.view(len(sums), -1))


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
    _, n, c, height, width = out.shape
    pixels_of_image = height * width
    call = table.FanOut(
        of_shared.address, of_shared.count, m=n * pixels_of_image, c=c, pixels=pixels_of_image
    )
    read = [read_of(read) for of_source in readers for read in of_source]
    return [Launch(name, list(tensors([read, out])), Table([call]), [of_shared, *of_readers])]


def add(terms: Sequence[Tensor], *, out: Tensor) -> list[Launch]:
    of_terms, c = Table([pixels(term) for term in terms]), out.shape[1]
    call = table.Sum(of_terms.address, of_terms.count, image(out), m=out.numel() // c, c=c)
    return [Launch("add", [*terms, out], Table([call]), [of_terms])]
