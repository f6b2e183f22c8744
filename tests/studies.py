"""Studies from numbers that a test writes down itself."""

import torch
from attributions import from_samples

from ssiuu_fast.ablation import AblationRow
from ssiuu_fast.attribution import KINDS, Site
from ssiuu_fast.correlation import correlation
from ssiuu_fast.evaluation.logit_lens import LogitLens
from ssiuu_fast.influence import influence_variation
from ssiuu_fast.influence_study import TARGETS, Study

SAMPLES, NEURONS = 12, 5


def attribution_of(support, suppression, *, layers=2, kinds=KINDS, target="probability", samples=SAMPLES, **settings):
    """An attribution whose neurons support by about `support` and suppress by about `suppression`, all samples alike
    up to 1 %."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for layer in range(layers):
        for kind in kinds:
            noise = 1 + 0.01 * torch.rand(samples, NEURONS, generator=generator, dtype=torch.float64)
            values[Site(layer, kind)] = (support * noise, -suppression * noise)
    weights = torch.poisson(torch.ones(50, samples), generator=generator).tolist()
    return from_samples(values, weights, target=target, **settings)


def made_up(
    name="GD",
    *,
    before=(1.0, 1.0),
    after=(1.0, 1.0),
    attacked=None,
    accuracy=(0.9, 0.3),
    probability=(0.4, 0.2),
    token_probability=None,
    recovered=0.3,
    control=None,
    rows=200,
    **settings,
):
    """A study in which every target sees these (support, suppression). recovered: accuracy with
    silenced spurious neurons; control: with those of the largest D+. token_probability: None for one-token answers."""
    roles = {"before": before, "after": after} | ({"attacked": attacked} if attacked else {})
    attributions = {
        role: {target: attribution_of(*values, target=target, **settings) for target in TARGETS}
        for role, values in roles.items()
    }
    variations = {t: influence_variation(attributions["before"][t], attributions["after"][t]) for t in TARGETS}
    pairs = [("before", "after"), *([("after", "attacked"), ("before", "attacked")] if attacked else [])]
    layers = settings.get("layers", 2)
    return Study(
        name=name,
        models={role: f"folder/{role}" for role in roles},
        rows=rows,
        chance=0.25,
        accuracy=dict(zip(roles, accuracy, strict=True)),
        probability=dict(zip(roles, (*probability, 0.3), strict=False)),
        token_probability=dict(zip(roles, (*(token_probability or probability), 0.3), strict=False)),
        unsureness={role: p * (1 - p) for role, p in zip(roles, (*probability, 0.3), strict=False)},
        attributions=attributions,
        variations=variations,
        correlations={
            t: {(a, b): correlation(attributions[a][t], attributions[b][t]) for a, b in pairs} for t in TARGETS
        },
        ablation={t: _ablation(variations[t], accuracy[1], recovered, control, t == TARGETS[0]) for t in TARGETS},
        lens={role: LogitLens([0.5 + 0.4 * (n + 1) / layers for n in range(layers)], rows, 0) for role in roles},
        notes=[],
    )


def _ablation(variation, intact, recovered, control, drawn):
    hiding = len(variation.spurious(3))
    rows = [AblationRow("none", 0, 0, None, intact)]
    rows += [AblationRow("spurious", m, min(m, hiding), None, recovered if hiding else intact) for m in (1, 3)]
    rows += [
        AblationRow("erased", m, min(m, len(variation.erased(m))), None, intact if control is None else control)
        for m in (1, 3)
    ]
    if drawn:
        rows += [AblationRow("random", m, m, seed, intact + 0.01 * seed) for m in (1, 3) for seed in (0, 1)]
    return rows
