"""Influence variation: was knowledge erased or hidden, where, and by which neurons? (METHOD; eq. 2, 4, 5)"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.attribution import KINDS, Attribution, Replicates, Site
from ssiuu_fast.correlation import check_finite, check_same_neurons

# neurons in the means that the paper's figures show
TOP = 100
_INTERVAL = (0.025, 0.975)
# what must agree for a difference of two attributions to mean anything, and what to say where it doesn't
_DEFINING = {
    "data": "of different data (sha256 of token ids and labels)",
    "target": "of different targets",
    "positions": "over different positions",
}
# A of P is P times A of log P, and A of log P of a sure answer is near 0: the target alone can decide what is seen
_OF_PROBABILITY = (
    "attributions are proportional to P(1 - P). Where it fell to near 0, all that there was counts as lost (D+) and "
    "hardly anything as hidden (D-); where it fell from near 1, the other way round, wherever the knowledge is"
)
_TARGET_NOTES = {
    "probability": _OF_PROBABILITY,
    "mean_token_probability": _OF_PROBABILITY,
    "log_probability": "attributions of a sure answer are near 0. Where its probability fell from near 1, hardly "
    "anything counts as lost (D+) and most as hidden (D-), wherever the knowledge is",
}


def influence_variation(before: Attribution, after: Attribution) -> "InfluenceVariation":
    """Positive influence lost (erased) and negative influence gained (hidden) from one checkpoint to the other.

    For each neuron i, means over the samples, max and min over the tokens k of the attribution A (eq. 4, 5):

        D+_i = max(0, mean[max_k A_before] − mean[max(max_k A_after, 0)])
        D-_i = max(0, mean[min_k A_before] − mean[min_k A_after])

    Both attributions are of the same samples, target, positions and modules; their dtypes may differ, which the notes
    say. Raises ValueError naming the difference where they don't belong together, or a mean that isn't finite.
    """
    _check_belonging(before, after)
    check_finite(before, "the attribution before")
    check_finite(after, "the attribution after")
    sites = sorted(before.max, key=_order)
    # what the paper clamps at 0 is the mean over samples, not each sample's difference
    return InfluenceVariation(
        positive={site: _lost(before.max[site], after.positive_max[site]).clamp(min=0) for site in sites},
        negative={site: _lost(before.min[site], after.min[site]).clamp(min=0) for site in sites},
        before=before,
        after=after,
        notes=_notes(before, after),
    )


class Influence(NamedTuple):
    """One number for D+ (positive influence lost: erased), one for D- (negative influence gained: hidden)."""

    positive: float
    negative: float


class Curves(NamedTuple):
    """Cumulative sums over all neurons, float64 [neurons] each: `positive[m-1]` is the sum of the m largest D+."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Amount:
    """D+ or D- of some neurons.

    sum: Σ_i max(0, D_i), the clamped scores. top_mean: mean of the 100 largest of them, or of all if there are fewer.
    unclamped: the same without the clamp, so neurons that moved the other way count against it. For D+ it is
    Σ_i mean[max(max_k A_before, 0)] − mean[max(max_k A_after, 0)]: eq. 4 clamps the maximum after alone, and its outer
    clamp hides the difference. Without that clamp, a maximum below 0 that stayed as it was would count as gained.
    interval: the 2.5 and 97.5 % quantiles of `unclamped`, and of nothing else, when the samples are drawn again
    (bootstrap with Poisson weights, the same before and after: Σ_s w_s·(its sum in sample s) / Σ_s w_s). None without
    replicates. The clamped sum has none: every redrawn sample adds noise, the clamp keeps the positive half of it, and
    most redrawn clamped sums lie above the one that was measured.
    """

    sum: float
    top_mean: float
    unclamped: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Cell:
    """One module kind of one layer in the table; kind and layer are None for the sum over all."""

    kind: str | None
    layer: int | None
    neurons: int
    positive: Amount
    negative: Amount


class Neuron(NamedTuple):
    """One output of a linear module: its path in the model, and the index among all the outputs of that module."""

    module: str
    index: int


@dataclass(frozen=True)
class SpuriousNeuron:
    """A neuron that hides: before and after are its mean min attributions, score = D- = before − after.

    module and index say where it is in the model: the path of a linear module and the index among all of its outputs,
    also where several sites share one module (fused Q, K and V).
    """

    site: Site
    module: str
    index: int
    before: float
    after: float
    score: float


@dataclass(frozen=True, eq=False)
class InfluenceVariation:
    """positive, negative: D+ and D- of every neuron, float64 [neurons] for each site, layer by layer."""

    positive: dict[Site, Tensor]
    negative: dict[Site, Tensor]
    before: Attribution
    after: Attribution
    notes: tuple[str, ...]

    @property
    def neurons(self) -> int:
        return self._starts[-1]

    @property
    def samples(self) -> int:
        return self.before.samples

    @property
    def settings(self) -> dict:
        """What defines the result: the settings of both attributions. JSON-able."""
        return {"before": self.before.settings, "after": self.after.settings, "notes": list(self.notes)}

    def top(self, m: int = TOP) -> Influence:
        """Sums of the m largest D+ and of the m largest D-, each sorted on its own (Fig. 3c)."""
        return Influence(*(float(_largest(scores, m).sum()) for scores in (self._all_positive, self._all_negative)))

    def curves(self) -> Curves:
        """Cumulative sums over neurons from the largest score down, D+ and D- each sorted on its own (Fig. 3b)."""
        return Curves(
            *(scores.sort(descending=True).values.cumsum(dim=0) for scores in (self._all_positive, self._all_negative))
        )

    def by_module(self) -> list[Cell]:
        """A cell for each module kind and layer: kinds in the order Q, K, V, O, gate, up, down, layers upwards."""
        sites = sorted(self.positive, key=lambda site: (_kind_order(site.kind), site.layer))
        return [self._cell([site], site.kind, site.layer) for site in sites]

    def total(self) -> Cell:
        """The same over all neurons."""
        return self._cell(list(self.positive), None, None)

    def share_in_qk(self) -> Influence:
        """Part of ΣD+ and of ΣD- that lies in Q and K, the attention's routing; NaN where the whole sum is 0."""

        def share(scores: dict[Site, Tensor]) -> float:
            whole = sum(float(values.sum()) for values in scores.values())
            routing = sum(float(values.sum()) for site, values in scores.items() if site.kind in ("Q", "K"))
            return routing / whole if whole else float("nan")

        return Influence(share(self.positive), share(self.negative))

    def spurious(self, m: int) -> list[SpuriousNeuron]:
        """The m neurons that hide most, largest D- first; fewer where fewer have a D- above 0.

        Equal scores are in the order of layer, module kind and index.
        """
        return [self._spurious(place) for place in _ranked(self._all_negative, m)]

    def erased(self, m: int) -> list[Neuron]:
        """The m neurons that lost most, largest D+ first; fewer where fewer have a D+ above 0."""
        return [self.neuron_at(place) for place in _ranked(self._all_positive, m)]

    def neuron_at(self, place: int) -> Neuron:
        """Where in the model after unlearning the neuron 0 ≤ place < `neurons` is, in the order of `positive`."""
        site, index = self._locate(place)
        return Neuron(*self.after.address(site, index))

    def _spurious(self, place: int) -> SpuriousNeuron:
        site, index = self._locate(place)
        module, own_index = self.neuron_at(place)
        return SpuriousNeuron(
            site=site,
            module=module,
            index=own_index,
            before=float(self.before.min[site][index]),
            after=float(self.after.min[site][index]),
            score=float(self.negative[site][index]),
        )

    def _locate(self, place: int) -> tuple[Site, int]:
        if not 0 <= place < self.neurons:
            raise IndexError(f"there are neurons 0 to {self.neurons - 1}, not {place}")
        number = bisect_right(self._starts, place) - 1
        return self._sites[number], place - self._starts[number]

    @cached_property
    def _sites(self) -> list[Site]:
        return list(self.positive)

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((len(scores) for scores in self.positive.values()), initial=0))

    @cached_property
    def _all_positive(self) -> Tensor:
        return torch.cat(list(self.positive.values()))

    @cached_property
    def _all_negative(self) -> Tensor:
        return torch.cat(list(self.negative.values()))

    def _cell(self, sites: Sequence[Site], kind: str | None, layer: int | None) -> Cell:
        return Cell(
            kind=kind,
            layer=layer,
            neurons=sum(len(self.positive[site]) for site in sites),
            positive=self._amount(self.positive, "positive_max", sites),
            negative=self._amount(self.negative, "min", sites),
        )

    def _amount(self, scores: dict[Site, Tensor], means: str, sites: Sequence[Site]) -> Amount:
        """means: those whose difference is summed without the clamp."""
        clamped = torch.cat([scores[site] for site in sites])
        had, has = getattr(self.before, means), getattr(self.after, means)
        return Amount(
            sum=float(clamped.sum()),
            top_mean=float(_largest(clamped, TOP).mean()),
            unclamped=sum(float(_lost(had[site], has[site]).sum()) for site in sites),
            interval=self._interval(means, sites),
        )

    def _interval(self, means: str, sites: Sequence[Site]) -> tuple[float, float] | None:
        before, after = self.before.replicates, self.after.replicates
        if not _paired(before, after):
            return None
        # Poisson weights of a handful of samples can all be 0
        drawn = before.weights > 0
        sums = sum(getattr(before, means)[site] - getattr(after, means)[site] for site in sites)
        redrawn = sums[drawn] / before.weights[drawn]
        return tuple(redrawn.quantile(torch.tensor(_INTERVAL, dtype=redrawn.dtype)).tolist())


def _check_belonging(before: Attribution, after: Attribution) -> None:
    for name, difference in _DEFINING.items():
        had, has = before.settings[name], after.settings[name]
        if had != has:
            raise ValueError(f"the two attributions are {difference}: {had!r} before, {has!r} after")
    if before.samples != after.samples:
        raise ValueError(f"the two attributions are of {before.samples} samples before and {after.samples} after")
    check_same_neurons(before, after)


def _notes(before: Attribution, after: Attribution) -> tuple[str, ...]:
    notes = list(dict.fromkeys([*before.settings["notes"], *after.settings["notes"]]))
    target = before.settings["target"]
    if target in _TARGET_NOTES:
        notes.append(f"target {target}: {_TARGET_NOTES[target]}")
    had, has = before.settings["dtype"], after.settings["dtype"]
    if had != has:
        notes.append(f"the model was in {had} before and in {has} after: part of D+ and D- is rounding")
    replicates = (before.replicates, after.replicates)
    if None not in replicates and not _paired(*replicates):
        notes.append("no intervals: samples were redrawn differently before and after")
    return tuple(notes)


def _paired(before: Replicates | None, after: Replicates | None) -> bool:
    """Whether the replicates before and after are of the same draws."""
    return before is not None and after is not None and torch.equal(before.weights, after.weights)


def _lost(had: Tensor, has: Tensor) -> Tensor:
    return had.double() - has.double()


def _largest(scores: Tensor, m: int) -> Tensor:
    return scores.topk(min(m, len(scores))).values


def _ranked(scores: Tensor, m: int) -> list[int]:
    """Places of the m largest scores above 0, the largest first; of equal ones, the first."""
    values, places = scores.sort(descending=True, stable=True)
    return places[: min(m, int((values > 0).sum()))].tolist()


def _kind_order(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def _order(site: Site) -> tuple:
    return (site.layer, *_kind_order(site.kind))
