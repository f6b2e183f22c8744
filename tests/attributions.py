"""Attributions from numbers that a test writes down itself."""

import torch

from ssiuu_fast.attribution import Attribution, Replicates, Site


def attribution(largest, smallest, positive=None, replicates=None, precision=torch.float32, samples=4, **settings):
    """Means of each site, given as lists: {Site: numbers}. positive: the means of max(max, 0), else of `largest`."""

    def tensors(means):
        return {site: torch.tensor(values, dtype=precision) for site, values in means.items()}

    positive = {site: [max(0.0, value) for value in values] for site, values in largest.items()} | (positive or {})
    own = {
        "model": "made/up",
        "data": "5ha256",
        "target": "probability",
        "positions": "all",
        "dtype": "float32",
        "modules": {site.text: path_of(site) for site in largest},
        "columns": {},
        "notes": [],
        "underflows": 0,
    }
    return Attribution(
        max=tensors(largest),
        positive_max=tensors(positive),
        min=tensors(smallest),
        samples=samples,
        settings=own | settings,
        replicates=replicates,
    )


def from_samples(values, weights=None, **settings):
    """The attribution whose sample s has the max and min attributions values[site] = (max, min), [samples, neurons]
    each, with replicates for the Poisson weights [replicates, samples]."""
    largest = {site: top.mean(0).tolist() for site, (top, _) in values.items()}
    positive = {site: top.clamp(min=0).mean(0).tolist() for site, (top, _) in values.items()}
    smallest = {site: low.mean(0).tolist() for site, (_, low) in values.items()}
    replicates = weights and Replicates(
        weights=torch.tensor(weights, dtype=torch.float64).sum(dim=1),
        max={site: torch.tensor(weights).double() @ top.sum(dim=1) for site, (top, _) in values.items()},
        positive_max={
            site: torch.tensor(weights).double() @ top.clamp(min=0).sum(dim=1) for site, (top, _) in values.items()
        },
        min={site: torch.tensor(weights).double() @ low.sum(dim=1) for site, (_, low) in values.items()},
    )
    samples = len(next(iter(values.values()))[0])
    return attribution(largest, smallest, positive, replicates, torch.float64, samples, **settings)


def path_of(site: Site) -> str:
    inside = {"Q": "self_attn.q_proj", "K": "self_attn.k_proj", "V": "self_attn.v_proj", "O": "self_attn.o_proj"}
    return f"model.layers.{site.layer}.{inside.get(site.kind, f'mlp.{site.kind}_proj')}"
