"""Which pictures a study is shown in, with their titles and how to read them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from ssiuu_fast.attribution import KINDS, Attribution
from ssiuu_fast.evaluation.logit_lens import CHANCE
from ssiuu_fast.influence import InfluenceVariation
from ssiuu_fast.influence_study import AFTER, ATTACKED, BEFORE, LOG_PROBABILITY, LOGIT_DIFFERENCE, PROBABILITY, Study
from ssiuu_fast.report import influence_figures as figures
from ssiuu_fast.report.drawing import MINUS, short
from ssiuu_fast.report.verdict import best_recovery

UNITS = {PROBABILITY: "in P", LOG_PROBABILITY: "in nats", LOGIT_DIFFERENCE: "in logits"}


@dataclass(frozen=True)
class Picture:
    """One picture in a file. study: whose it is, by name. target: what its attributions are of; None where there are
    none. text: how to read it, a sentence."""

    path: Path
    study: str
    target: str | None
    title: str
    text: str


def draw_all(studies: Sequence[Study], folder: Path) -> list[Picture]:
    """Draws every picture into folder: by target, by kind, then by study, so that what is compared stands together.

    Pictures of one kind and target have one scale.
    """
    stems = _stems(studies)
    pictures = []
    for target in (PROBABILITY, _second(studies)):
        shown = [(study, f"{stem}-{target}") for study, stem in zip(studies, stems, strict=True)]
        shown = [(study, folder / stem) for study, stem in shown if target in study.variations]
        curves_limit = max(float(max(c[-1] for c in study.variations[target].curves())) for study, _ in shown)
        tables = [_cells(study.variations[target]) for study, _ in shown]
        cells_limit = max(float(numpy.nanmax(numpy.stack(table[2:]))) for table in tables)
        pictures += [_by_layer(study, target, path) for study, path in shown]
        pictures += [_curves(study, target, path, curves_limit) for study, path in shown]
        pictures += [
            _heat_maps(study, target, path, table, cells_limit)
            for (study, path), table in zip(shown, tables, strict=True)
        ]
        pictures += [_ablation(study, target, path) for study, path in shown]
        pictures += [_hexbin(study, target, path) for study, path in shown if ATTACKED in study.models]
    lenses = [(study, folder / stem) for study, stem in zip(studies, stems, strict=True) if all(study.lens.values())]
    return pictures + [_lens(study, path) for study, path in lenses]


def _by_layer(study: Study, target: str, path: Path) -> Picture:
    before, after = (study.attributions[role][target] for role in (BEFORE, AFTER))
    sizes = [sum(float(a.max[s].sum() - a.min[s].sum()) for s in a.max) for a in (before, after)]
    title = f"Attributions {_times(*sizes)} after unlearning"
    path = _file(path, "layers")
    figures.attribution_by_layer(path, _layers(before), _layers(after), unit=UNITS[target], title=title)
    text = (
        "Above 0: how much each neuron supports the answer where it supports it most; below 0: how much it suppresses "
        "it. Thick or dark: the middle half of a layer's neurons; thin or light: all but 1 % at either end."
    )
    return Picture(path, study.name, target, title, text)


def _curves(study: Study, target: str, path: Path, limit: float) -> Picture:
    variation = study.variations[target]
    curves = variation.curves()
    lost, gained = (float(curve[-1]) for curve in curves)
    title = f"Support lost {short(lost)}, suppression gained {short(gained)}"
    path = _file(path, "curves")
    figures.cumulative_curves(
        path, curves.positive.numpy(), curves.negative.numpy(), unit=UNITS[target], title=title, limit=limit or None
    )
    text = (
        "Sums over the neurons with the largest scores: a curve that is high early has few of them carry the change. "
        f"Where D{MINUS} is the higher one, this target sees more hidden than erased."
    )
    return Picture(path, study.name, target, title, text)


def _heat_maps(study: Study, target: str, path: Path, table, limit: float) -> Picture:
    kinds, layers, positive, negative = table
    most = {}
    for name, values in (("lost", positive), ("gained", negative)):
        row, column = numpy.unravel_index(numpy.nanargmax(values), values.shape)
        most[name] = (f"{kinds[row]} of layer {layers[column]}", float(values[row, column]))
    title = f"Most support lost in {most['lost'][0]}"
    if most["gained"][1] > 0:
        title += f", most suppression gained in {most['gained'][0]}"
    path = _file(path, "modules")
    panels = (f"D+ lost, at most {short(most['lost'][1])}", f"D{MINUS} gained, at most {short(most['gained'][1])}")
    figures.heat_maps(
        path,
        kinds,
        layers,
        positive,
        negative,
        unit=UNITS[target],
        title=title,
        panel_titles=panels,
        limit=limit or None,
    )
    text = "Mean of the 100 largest neurons of each module. White is 0, and both halves have one scale" + (
        ": a half that stays white changed little." if min(m[1] for m in most.values()) < limit / 20 else "."
    )
    if numpy.isnan(positive).any():
        text += " Grey: no such module."
    return Picture(path, study.name, target, title, text)


def _ablation(study: Study, target: str, path: Path) -> Picture:
    rows = study.ablation[target] + [
        row for other, found in study.ablation.items() if other != target for row in found if row.choice == "random"
    ]
    accuracies: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.choice != "none" and row.silenced:
            scores = accuracies.setdefault(row.choice, {}).setdefault(row.silenced, [])
            # where fewer neurons have a score than were asked for, the same ones are silenced again
            if row.choice == "random" or not scores:
                scores.append(row.score)
    found = best_recovery({target: rows}, study.chance, study.rows)
    if found is None:
        title = f"No neuron gained suppression: no D{MINUS} to silence"
    elif found.brings_back:
        title = f"Silencing {found.m} spurious neurons lifts accuracy from {found.intact:.2f} to {found.best:.2f}"
    else:
        title = "Silencing spurious neurons brings little back"
    path = _file(path, "silenced")
    intact = study.accuracy[AFTER]
    figures.ablation_curve(path, accuracies, intact=intact, chance=study.chance, title=title)
    text = (
        "Accuracy on what was to be forgotten while neurons are silenced. If spurious ones hide it, it rises with them "
        "and not with as many random ones (shaded: from the worst to the best draw)."
    )
    return Picture(path, study.name, target, title, text)


def _hexbin(study: Study, target: str, path: Path) -> Picture:
    found = study.correlations[target][AFTER, ATTACKED]
    earlier, later = (_flat(study.attributions[role][target]) for role in (AFTER, ATTACKED))
    if found.pearson != found.pearson:
        title = "Attributions are all alike in one of the two models: ρ is undefined"
    else:
        moved = "hardly moved" if found.pearson >= 0.95 else "moved" if found.pearson >= 0.8 else "upset"
        title = f"The attack {moved} the attributions: ρ {found.pearson:.2f}"
    path = _file(path, "attacked")
    figures.attribution_hexbin(
        path,
        earlier,
        later,
        pearson=found.pearson,
        spearman=found.spearman,
        names=("unlearned", "attacked"),
        unit=UNITS[target],
        title=title,
    )
    text = (
        "Each neuron twice: where it supports most and where it suppresses most. On the dashed line the attack changed "
        "nothing. Both axes are stretched around 0."
    )
    return Picture(path, study.name, target, title, text)


def _lens(study: Study, path: Path) -> Picture:
    means = {role: lens.means for role, lens in study.lens.items()}
    last = means[AFTER][-1]
    best = max(range(len(means[AFTER])), key=lambda layer: means[AFTER][layer])
    if last < CHANCE - 0.1:
        title = f"After unlearning the right answer ends below chance ({last:.2f})"
    elif means[AFTER][best] > last + 0.1:
        title = (
            f"After {best + 1} of {len(means[AFTER])} layers it knows more ({means[AFTER][best]:.2f}) than at the end "
            f"({last:.2f})"
        )
    else:
        title = f"Right against wrong fell from {means[BEFORE][-1]:.2f} to {last:.2f}"
    path = _file(path, "lens")
    figures.logit_lens_by_layer(path, means, title=title, chance=CHANCE)
    lens = study.lens[AFTER]
    text = (
        f"What the original model's output head reads off after each layer, mean of {lens.pairs} pairs. At the dashed "
        "line right and wrong are alike; a hump before the end is knowledge that later layers hide."
    )
    return Picture(path, study.name, None, title, text)


def _second(studies: Sequence[Study]) -> str:
    """The other target that is drawn."""
    return LOGIT_DIFFERENCE if any(LOGIT_DIFFERENCE in study.variations for study in studies) else LOG_PROBABILITY


def _layers(attribution: Attribution) -> dict[int, tuple[numpy.ndarray, numpy.ndarray]]:
    layers = sorted({site.layer for site in attribution.max})
    return {
        layer: tuple(
            torch.cat([values for site, values in means.items() if site.layer == layer]).double().numpy()
            for means in (attribution.max, attribution.min)
        )
        for layer in layers
    }


def _flat(attribution: Attribution) -> numpy.ndarray:
    return torch.cat([*attribution.max.values(), *attribution.min.values()]).double().numpy()


def _cells(variation: InfluenceVariation):
    """(kinds, layers, top means of D+ [kinds, layers], of D-); NaN where a layer has no such module."""
    table = variation.by_module()
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in table)]
    layers = sorted({cell.layer for cell in table})
    positive, negative = (numpy.full((len(kinds), len(layers)), numpy.nan) for _ in range(2))
    for cell in table:
        place = kinds.index(cell.kind), layers.index(cell.layer)
        positive[place], negative[place] = cell.positive.top_mean, cell.negative.top_mean
    return kinds, layers, positive, negative


def _times(before: float, after: float) -> str:
    if not before or not after:
        return "vanish" if before else "are as they were"
    ratio = after / before
    if 0.8 < ratio < 1.25:
        return "are about as large"
    return f"are {short(ratio)} times as large" if ratio > 1 else f"are {short(1 / ratio)} times smaller"


def _stems(studies: Sequence[Study]) -> list[str]:
    """A file name for each study, whatever it is called; no two alike."""
    return [
        f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', study.name).strip('-')[:40]}"
        for number, study in enumerate(studies, 1)
    ]


def _file(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}-{kind}.svg")
