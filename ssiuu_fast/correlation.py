"""Correlation of two attributions: do the same neurons support and suppress the answers? (METHOD; Fig. 6)"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.attribution import Attribution


class Coefficients(NamedTuple):
    """NaN where one of the two sides is constant."""

    pearson: float
    spearman: float


@dataclass(frozen=True)
class Correlation:
    """Correlation of two attributions over neurons.

    pearson, spearman: over the max means and the min means of all neurons as one list, two points a neuron. Most max
    means are positive and most min means negative, which alone makes for some correlation; `max` and `min` are over
    these points apart. by_kind: as pearson and spearman, for the neurons of one kind of module. neurons: their number.
    """

    pearson: float
    spearman: float
    max: Coefficients
    min: Coefficients
    by_kind: dict[str, Coefficients]
    neurons: int


def correlation(a: Attribution, b: Attribution) -> Correlation:
    """Pearson and Spearman correlation of the mean attributions of two checkpoints, such as before and after an attack.

    Ranks of equal values are averaged. Raises ValueError where the two don't have the same neurons, or where a mean
    isn't a number.
    """
    check_same_neurons(a, b)
    check_finite(a, "the first attribution")
    check_finite(b, "the second attribution")
    pairs = {
        site: (torch.stack([a.max[site], a.min[site]]).double(), torch.stack([b.max[site], b.min[site]]).double())
        for site in a.max
    }
    first, second = _joined(pairs.values())
    together = _coefficients(first.flatten(), second.flatten())
    kinds = dict.fromkeys(site.kind for site in pairs)
    return Correlation(
        pearson=together.pearson,
        spearman=together.spearman,
        max=_coefficients(first[0], second[0]),
        min=_coefficients(first[1], second[1]),
        by_kind={
            kind: _coefficients(
                *(side.flatten() for side in _joined(pair for site, pair in pairs.items() if site.kind == kind))
            )
            for kind in kinds
        },
        neurons=first.shape[1],
    )


def check_same_neurons(a: Attribution, b: Attribution) -> None:
    """Raises ValueError where two attributions don't have the same sites with as many neurons each."""
    if set(a.max) != set(b.max):
        only_first, only_second = sorted(set(a.max) - set(b.max)), sorted(set(b.max) - set(a.max))
        raise ValueError(
            "the two attributions are of different modules: "
            f"only the first has {_named(only_first)}, only the second {_named(only_second)}"
        )
    for site in a.max:
        if a.max[site].shape != b.max[site].shape:
            raise ValueError(
                f"the two attributions are of models of different size: {site.kind} of layer {site.layer} has "
                f"{len(a.max[site])} neurons in the first and {len(b.max[site])} in the second"
            )


def check_finite(attribution: Attribution, name: str) -> None:
    for what in ("max", "positive_max", "min"):
        for site, means in getattr(attribution, what).items():
            broken = int((~means.isfinite()).sum())
            if broken:
                raise ValueError(
                    f"{name} has {broken} neurons in {site.kind} of layer {site.layer} whose {what} mean isn't a "
                    "finite number: the model's outputs or gradients overflowed there"
                )


def ranks(values: Tensor) -> Tensor:
    """1 for the smallest … n for the largest, float64; equal values share the mean of their ranks."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0).double()
    return (last - (counts - 1) / 2)[place]


def _coefficients(a: Tensor, b: Tensor) -> Coefficients:
    return Coefficients(_pearson(a, b), _pearson(ranks(a), ranks(b)))


def _pearson(a: Tensor, b: Tensor) -> float:
    if a.min() == a.max() or b.min() == b.max():
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    # scaled first: attributions of forgotten answers are so small that their squares vanish
    a, b = a / a.abs().amax(), b / b.abs().amax()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _joined(pairs) -> tuple[Tensor, Tensor]:
    first, second = zip(*pairs, strict=True)
    return torch.cat(first, dim=1), torch.cat(second, dim=1)


def _named(sites: list) -> str:
    if not sites:
        return "none"
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    return ", ".join(f"{kind} of layer {layer}" for layer, kind in sites[:3]) + more
