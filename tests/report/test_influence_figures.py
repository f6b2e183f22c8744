"""Pictures for one layer and for forty, with nothing in them and with everything; their numbers lie beside them."""

import csv
import math
from xml.etree import ElementTree

import numpy
import pytest

from ssiuu_fast.report import influence_figures as figures

KINDS = ("Q", "K", "V", "O", "gate", "up", "down")


def numbers(path):
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert "nan" not in row.values()
    return rows


def texts(path):
    """matplotlib writes each text into a comment beside its shapes."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(path, parser)
    return [node.text.strip() for node in tree.iter() if node.tag is ElementTree.Comment]


def spread(layers, scale=1.0):
    draw = numpy.random.default_rng(layers)
    return {n: (scale * draw.random(50), -scale * draw.random(50)) for n in range(layers)}


@pytest.mark.parametrize("layers", [1, 2, 40])
def test_attributions_by_layer(tmp_path, layers):
    before, after = spread(layers), spread(layers, 0.1)
    figures.attribution_by_layer(tmp_path / "a.svg", before, after, unit="in P", title="smaller")
    rows = numbers(tmp_path / "a.svg")
    assert len(rows) == layers * 4
    row = next(r for r in rows if (r["layer"], r["model"], r["attribution"]) == ("0", "after", "smallest"))
    assert float(row["quantile 0.5"]) == pytest.approx(numpy.median(after[0][1]))
    assert {"smaller", "layer", "attribution, in P", "before", "after"} <= set(texts(tmp_path / "a.svg"))


@pytest.mark.parametrize("neurons", [1, 99, 101, 100_000])
def test_cumulative_curves(tmp_path, neurons):
    positive = numpy.cumsum(numpy.sort(numpy.random.default_rng(0).random(neurons))[::-1])
    figures.cumulative_curves(tmp_path / "c.svg", positive, positive / 2, unit="in P", title="lost", limit=10.0)
    rows = numbers(tmp_path / "c.svg")
    assert len(rows) <= 401
    for row in rows:
        assert float(row["D+"]) == pytest.approx(positive[int(row["neurons"]) - 1])
        assert float(row["D-"]) == pytest.approx(float(row["D+"]) / 2)
    assert {int(row["neurons"]) for row in rows} >= ({1, 100, neurons} if neurons > 100 else {1, neurons})


@pytest.mark.parametrize("layers", [1, 40])
def test_heat_maps_leave_out_what_a_model_lacks(tmp_path, layers):
    positive = numpy.arange(7.0 * layers).reshape(7, layers)
    positive[4] = numpy.nan
    negative = numpy.where(numpy.isnan(positive), numpy.nan, 0.0)
    figures.heat_maps(
        tmp_path / "h.svg",
        KINDS,
        list(range(layers)),
        positive,
        negative,
        unit="in P",
        title="most",
        panel_titles=("lost", "gained"),
    )
    rows = numbers(tmp_path / "h.svg")
    assert len(rows) == 7 * layers
    assert all((row["D+"] == "") == (row["module"] == "gate") for row in rows)
    assert float(rows[-1]["D+"]) == positive[6, -1]
    # one scale for both halves: its end is written at both colour bars
    assert texts(tmp_path / "h.svg").count(f"{positive[6, -1]:.3g}") == 2


def test_hexbin_counts_every_neuron(tmp_path):
    draw = numpy.random.default_rng(0)
    earlier = draw.standard_t(2, 5000)
    figures.attribution_hexbin(
        tmp_path / "x.svg",
        earlier,
        earlier * 0.9,
        pearson=0.987,
        spearman=math.nan,
        names=("unlearned", "attacked"),
        unit="in P",
        title="hardly",
    )
    rows = numbers(tmp_path / "x.svg")
    assert sum(int(row["neurons"]) for row in rows) == 5000
    assert "Pearson ρ 0.99, Spearman ρ undefined" in texts(tmp_path / "x.svg")


@pytest.mark.parametrize("layers", [1, 40])
def test_logit_lens(tmp_path, layers):
    values = {"before": [0.9] * layers, "after": [0.4] * layers}
    figures.logit_lens_by_layer(tmp_path / "l.svg", values, title="lens")
    assert numbers(tmp_path / "l.svg")[-1] == {"after layer": str(layers), "before": "0.9", "after": "0.4"}
    assert "chance" in texts(tmp_path / "l.svg")


def test_ablation_curve(tmp_path):
    accuracies = {"spurious": {1: [0.4], 10: [0.8]}, "random": {1: [0.3, 0.32], 10: [0.2, 0.4]}}
    figures.ablation_curve(tmp_path / "s.svg", accuracies, intact=0.3, chance=0.25, title="back")
    rows = numbers(tmp_path / "s.svg")
    assert [row["silenced"] for row in rows] == ["none", "spurious", "spurious", "random", "random"]
    assert [float(rows[-1][name]) for name in ("accuracy", "smallest", "largest", "seeds")] == [
        pytest.approx(0.3),
        0.2,
        0.4,
        2,
    ]


def test_nothing_to_draw_is_said(tmp_path):
    none = numpy.array([])
    figures.attribution_by_layer(tmp_path / "1.svg", {}, {}, unit="u", title="t")
    figures.cumulative_curves(tmp_path / "2.svg", none, none, unit="u", title="t")
    empty = numpy.full((2, 1), numpy.nan)
    figures.heat_maps(
        tmp_path / "3.svg", ("Q", "K"), [0], empty, empty, unit="u", title="t", panel_titles=("lost", "gained")
    )
    figures.attribution_hexbin(
        tmp_path / "4.svg", none, none, pearson=math.nan, spearman=math.nan, names=("a", "b"), unit="u", title="t"
    )
    figures.logit_lens_by_layer(tmp_path / "5.svg", {"before": [], "after": []}, title="t")
    figures.ablation_curve(tmp_path / "6.svg", {}, intact=0.3, chance=0.25, title="t")
    for number in range(1, 7):
        assert any("nothing was measured" in text for text in texts(tmp_path / f"{number}.svg")), number
        numbers(tmp_path / f"{number}.svg")


def test_zeros_are_drawn(tmp_path):
    zero = numpy.zeros(20)
    figures.attribution_by_layer(tmp_path / "1.svg", {0: (zero, zero)}, {0: (zero, zero)}, unit="u", title="t")
    figures.cumulative_curves(tmp_path / "2.svg", zero, zero, unit="u", title="t")
    figures.heat_maps(
        tmp_path / "3.svg", ("Q",), [0], zero[:1, None], zero[:1, None], unit="u", title="t", panel_titles=("a", "b")
    )
    figures.attribution_hexbin(
        tmp_path / "4.svg", zero, zero, pearson=math.nan, spearman=math.nan, names=("a", "b"), unit="u", title="t"
    )


def test_png_for_slides(tmp_path):
    figures.logit_lens_by_layer(tmp_path / "l.png", {"before": [0.5, 0.9], "after": [0.5, 0.3]}, title="lens")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert len(numbers(tmp_path / "l.png")) == 2
