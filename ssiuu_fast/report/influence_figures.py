"""Pictures of what became of a model's attributions. They take arrays and write their numbers beside themselves.

Every function writes a picture (svg or png, by the suffix of its path) and the same name with .csv. D+ is the positive
influence that was lost, D- the negative influence that was gained (METHOD: eq. 4 and 5).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy

from ssiuu_fast.report.drawing import (
    AFTER,
    ATTACKED,
    BEFORE,
    GAINED,
    LOST,
    MINUS,
    PLAIN,
    legend_below,
    picture,
    short,
    titled,
    write_csv,
)

# of the neurons of a layer: the ends of the thin line, and of the thick one
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
TOP = 100
# with more layers than this, bars would touch: bands from layer to layer
BARS = 16
_ROLE_COLOURS = {"before": BEFORE, "after": AFTER, "attacked": ATTACKED}
_SILENCED = {"spurious": ("o-", GAINED), "erased": ("s-", LOST), "random": ("D--", PLAIN)}


def attribution_by_layer(
    path: Path,
    before: Mapping[int, tuple[numpy.ndarray, numpy.ndarray]],
    after: Mapping[int, tuple[numpy.ndarray, numpy.ndarray]],
    *,
    unit: str,
    title: str,
) -> None:
    """How the attributions of each layer's neurons are spread, before and after.

    before, after: layer → (mean over samples of the largest attribution of each neuron, of the smallest). unit: of the
    axis, e.g. "of P(answer)".
    """
    rows = [
        [layer, role, side, len(values), *numpy.quantile(values, QUANTILES)]
        for role, layers in (("before", before), ("after", after))
        for layer, pair in layers.items()
        for side, values in zip(("largest", "smallest"), pair, strict=True)
        if len(values)
    ]
    write_csv(path, ["layer", "model", "attribution", "neurons", *(f"quantile {q:g}" for q in QUANTILES)], rows)
    with picture(path, 3.6) as axes:
        largest = max((max(abs(row[4]), abs(row[8])) for row in rows), default=0.0) or 1.0
        threshold = largest / 100
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        for role in ("before", "after"):
            of_role = [row for row in rows if row[1] == role]
            if len(before) <= BARS:
                _bars(axes, of_role, role, -0.18 if role == "before" else 0.18, thick=min(9.0, 60 / len(before)))
            else:
                _bands(axes, of_role, role)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlim(min(before, default=0) - 0.6, max(before, default=0) + 0.6)
        _layers(axes, list(before))
        ticks = _powers(largest, lambda value: math.asinh(value / threshold), math.asinh(largest / threshold))
        axes.set_yticks(ticks, [short(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("layer")
        axes.set_ylabel(f"attribution, {unit}")
        titled(axes, title)
        _say_if_empty(axes, not rows)
        if rows:
            legend_below(axes, 2)


def _bars(axes, rows: Sequence[Sequence], role: str, shift: float, thick: float) -> None:
    places, colour = [row[0] + shift for row in rows], _ROLE_COLOURS[role]
    ends, middle = ([row[4] for row in rows], [row[8] for row in rows]), ([r[5] for r in rows], [r[7] for r in rows])
    axes.vlines(places, *ends, colour, linewidth=max(thick / 5, 0.8))
    axes.vlines(places, *middle, colour, linewidth=thick, label=role)


def _bands(axes, rows: Sequence[Sequence], role: str) -> None:
    for side in ("largest", "smallest"):
        of_side = [row for row in rows if row[2] == side]
        layers = [row[0] for row in of_side]
        for low, high, opacity in ((4, 8, 0.2), (5, 7, 0.55)):
            label = role if side == "largest" and low == 5 else None
            ends = [row[low] for row in of_side], [row[high] for row in of_side]
            axes.fill_between(layers, *ends, color=_ROLE_COLOURS[role], alpha=opacity, linewidth=0, label=label)


def cumulative_curves(
    path: Path,
    positive: numpy.ndarray,
    negative: numpy.ndarray,
    *,
    unit: str,
    title: str,
    limit: float | None = None,
) -> None:
    """The sum of D+ and of D- over the neurons with the largest scores, each sorted on its own (Fig. 3b).

    positive, negative: cumulative sums, largest score first. limit: the top of the axis, to be shared by pictures that
    are compared.
    """
    counts = _log_spaced(max(len(positive), len(negative)))
    write_csv(
        path,
        ["neurons", "D+", "D-"],
        [[n, *(curve[n - 1] if n <= len(curve) else "" for curve in (positive, negative))] for n in counts],
    )
    with picture(path, 3.4) as axes:
        for curve, colour, name, style in (
            (positive, LOST, "D+ lost", "-"),
            (negative, GAINED, f"D{MINUS} gained", "--"),
        ):
            at = [n for n in counts if n <= len(curve)]
            axes.plot(at, [curve[n - 1] for n in at], style, color=colour, label=name)
        axes.set_xscale("log")
        axes.set_xlim(1, max(len(positive), len(negative), 2))
        top = limit or max((float(curve[-1]) for curve in (positive, negative) if len(curve)), default=0.0) or 1.0
        axes.set_ylim(-0.02 * top, 1.05 * top)
        if len(counts) and counts[-1] > TOP:
            axes.axvline(TOP, color=PLAIN, linewidth=1, linestyle=":")
            axes.text(TOP * 1.1, 1.03 * top, f"top {TOP}", color="#555555", va="top")
        _plain_counts(axes.xaxis)
        axes.set_xlabel("neurons, largest score first")
        axes.set_ylabel(f"sum of influence,\n{unit}")
        titled(axes, title)
        _say_if_empty(axes, not len(counts))
        legend_below(axes, 2)


def heat_maps(
    path: Path,
    kinds: Sequence[str],
    layers: Sequence[int],
    positive: numpy.ndarray,
    negative: numpy.ndarray,
    *,
    unit: str,
    title: str,
    panel_titles: tuple[str, str],
    limit: float | None = None,
) -> None:
    """D+ and D- of each kind of module in each layer on one colour scale that starts at white for 0 (Fig. 5).

    positive, negative: [kinds, layers], NaN where a layer has no such module. limit: the end of both scales, to be
    shared by pictures that are compared; left open, the largest of all cells.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    positive, negative = (numpy.asarray(values, dtype=float) for values in (positive, negative))
    write_csv(
        path,
        ["module", "layer", "D+", "D-"],
        [
            [kind, layer, *("" if numpy.isnan(v[row, column]) else v[row, column] for v in (positive, negative))]
            for row, kind in enumerate(kinds)
            for column, layer in enumerate(layers)
        ],
    )
    cells = numpy.concatenate([positive.ravel(), negative.ravel()])
    cells = cells[~numpy.isnan(cells)]
    limit = limit or (float(cells.max()) if len(cells) else 0.0) or 1.0
    edges = numpy.arange(len(layers) + 1) - 0.5
    with picture(path, 5.6, panels=2) as panels:
        for axes, values, colour, panel_title in zip(
            panels, (positive, negative), (LOST, GAINED), panel_titles, strict=True
        ):
            colours = LinearSegmentedColormap.from_list("from white", ["#FFFFFF", colour, "#20140A"])
            # a cell without a module is no white cell
            axes.set_facecolor("#D9D9D9")
            mesh = axes.pcolormesh(
                edges,
                numpy.arange(len(kinds) + 1) - 0.5,
                numpy.ma.masked_invalid(values),
                cmap=colours,
                norm=Normalize(0, limit),
                edgecolors="#EEEEEE",
                linewidth=0.4,
            )
            axes.set_yticks(range(len(kinds)), kinds)
            axes.invert_yaxis()
            axes.tick_params(length=0)
            _layers(axes, layers, range(len(layers)))
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set_ylabel("module")
            axes.set_title(panel_title)
            bar = axes.figure.colorbar(mesh, ax=axes, aspect=12, pad=0.03)
            bar.set_ticks([0, limit / 2, limit], labels=["0", short(limit / 2), short(limit)])
            bar.solids.set_edgecolor("face")
            bar.outline.set_linewidth(0.5)
            bar.set_label(unit)
            _say_if_empty(axes, not numpy.isfinite(values).any())
        panels[-1].set_xlabel("layer")
        titled(panels[0], title)


def attribution_hexbin(
    path: Path,
    earlier: numpy.ndarray,
    later: numpy.ndarray,
    *,
    pearson: float,
    spearman: float,
    names: tuple[str, str],
    unit: str,
    title: str,
) -> None:
    """The attribution of every neuron in one model against that in another, as counts in hexagons, with ρ (Fig. 6).

    earlier, later: one value a neuron, in the same order. The numbers written are the hexagons' centres and counts.
    """
    rows: list[list[float]] = []
    sizes = numpy.abs(numpy.concatenate([earlier, later]))
    span = float(sizes.max(initial=0)) or 1.0
    # a few neurons are hundreds of times larger than most: nearly linear for nine tenths of them, a logarithm beyond
    unit_size = (float(numpy.quantile(sizes, 0.9)) if len(sizes) else 0.0) or span
    with picture(path, 4.0) as axes:
        end = float(numpy.arcsinh(span / unit_size)) * 1.05
        if len(earlier):
            hexagons = axes.hexbin(
                numpy.arcsinh(earlier / unit_size),
                numpy.arcsinh(later / unit_size),
                gridsize=36,
                bins="log",
                mincnt=1,
                extent=(-end, end, -end, end),
                cmap="viridis_r",
                linewidths=0.1,
            )
            centres = (numpy.sinh(hexagons.get_offsets()) * unit_size).tolist()
            rows = [[*centre, int(n)] for centre, n in zip(centres, hexagons.get_array().tolist(), strict=True)]
            bar = axes.figure.colorbar(hexagons, ax=axes, shrink=0.75, pad=0.03)
            bar.set_label("neurons in a hexagon")
            _plain_counts(bar.ax.yaxis)
            bar.minorticks_off()
            bar.outline.set_visible(False)
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
        # outside: whichever way the neurons lie, no corner is sure to be empty
        axes.set_title(f"Pearson ρ {_rho(pearson)}, Spearman ρ {_rho(spearman)}")
        axes.set_xlim(-end, end)
        axes.set_ylim(-end, end)
        axes.set_aspect("equal")
        ticks = _powers(span, lambda value: float(numpy.arcsinh(value / unit_size)), end)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([float(numpy.arcsinh(tick / unit_size)) for tick in ticks], [short(tick) for tick in ticks])
        axes.set_xlabel(f"{names[0]}, {unit}")
        axes.set_ylabel(f"{names[1]}, {unit}")
        titled(axes, title)
        _say_if_empty(axes, not len(earlier))
    write_csv(path, [*names, "neurons"], rows)


def logit_lens_by_layer(
    path: Path, preference: Mapping[str, Sequence[float]], *, title: str, chance: float = 0.5
) -> None:
    """P(right) / (P(right) + P(wrong)) read off after each layer, a line a model (Fig. 4).

    preference: before, after or attacked → one value for each layer, the first first.
    """
    write_csv(
        path,
        ["after layer", *preference],
        [[layer, *values] for layer, values in enumerate(zip(*preference.values(), strict=True), 1)],
    )
    with picture(path, 3.4) as axes:
        markers = {"before": "o", "after": "s", "attacked": "^"}
        for role, values in preference.items():
            marker = markers[role] if len(values) <= 20 else None
            axes.plot(
                range(1, 1 + len(values)), values, color=_ROLE_COLOURS[role], marker=marker, markersize=5, label=role
            )
        axes.axhline(chance, color="black", linewidth=1, linestyle="--", label="chance")
        axes.set_ylim(-0.02, 1.02)
        _layers(axes, range(1, 1 + max(map(len, preference.values()), default=0)))
        axes.set_xlabel("layers passed")
        axes.set_ylabel("right against wrong")
        titled(axes, title)
        _say_if_empty(axes, not any(map(len, preference.values())))
        legend_below(axes, 2)


def ablation_curve(
    path: Path,
    accuracies: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    intact: float,
    chance: float,
    title: str,
) -> None:
    """Accuracy on the forgotten rows when m neurons are silenced: the spurious ones, those of D+, random ones.

    accuracies: spurious, erased or random → m → one value a seed. intact: with nothing silenced.
    """
    write_csv(
        path,
        ["silenced", "m", "accuracy", "smallest", "largest", "seeds"],
        [["none", 0, intact, intact, intact, 1]]
        + [
            [kind, m, float(numpy.mean(seeds)), min(seeds), max(seeds), len(seeds)]
            for kind, by_m in accuracies.items()
            for m, seeds in by_m.items()
        ],
    )
    names = {"spurious": f"top D{MINUS} (spurious)", "erased": "top D+", "random": "random"}
    with picture(path, 3.8) as axes:
        for kind, by_m in accuracies.items():
            style, colour = _SILENCED[kind]
            ms = sorted(by_m)
            if any(len(by_m[m]) > 1 for m in ms):
                axes.fill_between(
                    ms, [min(by_m[m]) for m in ms], [max(by_m[m]) for m in ms], color=colour, alpha=0.25, linewidth=0
                )
            axes.plot(ms, [numpy.mean(by_m[m]) for m in ms], style, color=colour, markersize=5, label=names[kind])
        axes.axhline(intact, color="black", linewidth=1, label="none silenced")
        axes.axhline(chance, color="black", linewidth=1, linestyle="--", label="chance")
        axes.set_xscale("log")
        axes.set_ylim(-0.02, 1.02)
        _plain_counts(axes.xaxis)
        axes.set_xlabel("neurons silenced")
        axes.set_ylabel("accuracy")
        titled(axes, title)
        _say_if_empty(axes, not any(accuracies.values()))
        legend_below(axes, 2)


def _log_spaced(count: int) -> list[int]:
    """1 … count, all of them while they are few, then ever fewer: a curve on a log axis needs no more."""
    if count < 1:
        return []
    return sorted({int(round(n)) for n in numpy.geomspace(1, count, 400)} | ({TOP} if count > TOP else set()))


def _layers(axes, layers: Sequence[int], places: Sequence[int] | None = None) -> None:
    """A tick for each layer while they are few, then for every second, third, …"""
    step = -(-len(layers) // 8) or 1
    axes.set_xticks((layers if places is None else places)[::step], layers[::step])


def _plain_counts(axis) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))


def _powers(largest: float, place: Callable[[float], float], end: float) -> list[float]:
    """Ticks of an axis that is stretched around 0: 0, and the powers of ten on both sides that have room for a label.

    place: where a value stands on an axis that ends at ±end.
    """
    power = 10.0 ** math.floor(math.log10(largest))
    ticks: list[float] = []
    while len(ticks) < 3 and place(power) > 0.2 * end:
        if not ticks or place(ticks[-1]) - place(power) > 0.2 * end:
            ticks.append(power)
        power /= 10
    return [*(-tick for tick in ticks), 0.0, *reversed(ticks)]


def _rho(value: float) -> str:
    return "undefined" if value != value else f"{value:.2f}"


def _say_if_empty(axes, empty: bool) -> None:
    if empty:
        axes.text(
            0.5, 0.5, "nothing to draw:\nnothing was measured", transform=axes.transAxes, ha="center", va="center"
        )
