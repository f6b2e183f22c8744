"""Means over samples, and bootstrap replicates of their sums, while the samples stream by."""

import random
from bisect import bisect_right
from itertools import accumulate
from math import exp, factorial

import torch
from torch import Tensor

from ssiuu_fast.ops.neuron_attribution import NeuronAttribution
from ssiuu_fast.sites import Place, Site

REPLICATES = 200
SEED = 0
# of the three numbers a neuron has
ROLES = ("max", "positive_max", "min")


class StreamingMeans:
    """Σ over samples of max_k A, max(max_k A, 0) and min_k A of every neuron, and of every site in each replicate.

    Memory: 24 bytes a neuron (float64) on the device of the module's output, 19 MB for Llama-3.2-3B, for any number of
    samples; and 3 · 200 numbers a site.
    """

    def __init__(self, places: dict[Site, Place]):
        self.samples = 0
        self._places = places
        self._sites_of: dict[str, list[Site]] = {}
        for site, place in places.items():
            self._sites_of.setdefault(place.path, []).append(site)
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        # [3, B] of the batch in progress
        self._of_sample: dict[Site, Tensor] = {}
        self._replicates = torch.zeros(REPLICATES, len(places), 3, dtype=torch.float64)
        self._weight_sums = torch.zeros(REPLICATES, dtype=torch.float64)

    def add(self, path: str, attribution: NeuronAttribution, weights: Tensor) -> None:
        """attribution: [B, N] of one module, each sample of which is to be multiplied by its weight ≥ 0."""
        largest, smallest = (part * weights[:, None] for part in (attribution.max, attribution.min))
        # [3, B, N]
        roles = torch.stack([largest, largest.clamp(min=0), smallest])
        double = torch.float64 if roles.device.type != "mps" else torch.float32
        total = roles.sum(1, dtype=double)
        self._sums[path] = self._sums[path].add_(total) if path in self._sums else total
        self._dtypes[path] = roles.dtype
        for site in self._sites_of[path]:
            self._of_sample[site] = roles[..., self._columns(site, roles.device)].sum(-1, dtype=double)

    def end_batch(self) -> None:
        """Raises ValueError where an attribution of this batch isn't finite."""
        # [sites, 3, B]
        rows = torch.stack([self._of_sample[site].to("cpu", torch.float64) for site in self._places])
        self._of_sample = {}
        broken = (~rows.isfinite()).nonzero()
        if len(broken):
            site = list(self._places)[broken[0, 0]]
            raise ValueError(
                f"sample {self.samples + int(broken[0, 2])} has attributions that aren't finite (at {site.text}): are "
                "the model's weights sound, and does its dtype hold its activations? fp16 often doesn't: try bf16"
            )
        batch = rows.shape[2]
        weights = replicate_weights(range(self.samples, self.samples + batch))
        self._replicates += (weights @ rows.flatten(0, 1).T).view_as(self._replicates)
        self._weight_sums += weights.sum(1)
        self.samples += batch

    def means(self) -> list[dict[Site, Tensor]]:
        """One mapping for each of ROLES: [N] on the CPU, float32 (float64 for float64 outputs)."""
        result: list[dict[Site, Tensor]] = [{} for _ in ROLES]
        for site, place in self._places.items():
            mean = self._sums[place.path].cpu().double() / self.samples
            for role, values in zip(result, mean[:, self._columns(site, mean.device)], strict=True):
                role[site] = values.to(self._dtypes[place.path])
        return result

    def replicates(self) -> tuple[Tensor, list[dict[Site, Tensor]]]:
        """Σ of weights, [200], and a mapping for each of ROLES: [200] a site."""
        by_role = [
            {site: self._replicates[:, number, role].clone() for number, site in enumerate(self._places)}
            for role in range(len(ROLES))
        ]
        return self._weight_sums, by_role

    def _columns(self, site: Site, device: torch.device) -> slice | Tensor:
        columns = self._places[site].columns
        return columns if isinstance(columns, slice) else columns.to(device)


def replicate_weights(samples: range) -> Tensor:
    """Poisson(1) weights of a bootstrap by resampling, [200, samples] float64, drawn from (seed, number of the sample).

    So two attributions of the same data weigh it alike, replicate by replicate, however it was split into batches. The
    draws are Python's own: they don't change with the version of torch.
    """
    columns = []
    for sample in samples:
        draw = random.Random(f"{SEED} {sample}").random
        columns.append([bisect_right(_POISSON, draw()) for _ in range(REPLICATES)])
    return torch.tensor(columns, dtype=torch.float64).T


# cumulative probabilities of 0, 1, 2, …
_POISSON = list(accumulate(exp(-1) / factorial(number) for number in range(20)))
