"""Figures; each writes its numbers as CSV beside the picture."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssiuu_fast.report.text import mean_and_deviation


def grouped_bars(
    path: Path, groups: Sequence[str], scores: Mapping[str, Mapping[str, Sequence[float]]], *, chance: float, title: str
) -> None:
    """Bars of mean ± sd: one group a column of the table, one bar a method; a dashed line at chance.

    scores: method → group → one value a seed, in 0…1. Writes `path` (.png) and the same name with .csv.
    """
    # no window system is needed, and importing the package must not load it
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "column", "mean", "sd", "seeds"])
        for method, columns in scores.items():
            for group in groups:
                writer.writerow([method, group, *mean_and_deviation(columns[group]), len(columns[group])])

    figure, axes = pyplot.subplots(figsize=(1.5 * len(groups) + 2, 3.6), layout="constrained")
    width = 0.8 / len(scores)
    for index, (method, columns) in enumerate(scores.items()):
        means, deviations = zip(*(mean_and_deviation(columns[group]) for group in groups), strict=True)
        places = [place + (index - (len(scores) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, means, width * 0.92, yerr=deviations, capsize=3, label=method)
    axes.axhline(chance, color="black", linestyle="--", linewidth=0.8, label="chance")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("score")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=min(len(scores) + 1, 5), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
