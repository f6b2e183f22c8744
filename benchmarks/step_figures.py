"""Pictures of benchmarks/step.py, each with its numbers as CSV beside it."""

from pathlib import Path

from step_report import StepRow

from ssiuu_fast.report.drawing import GAINED, LOST, PLAIN, picture, short, titled, write_csv


def time_against_memory(path: Path, rows: list[StepRow]) -> None:
    """A point a contestant: its step's time and its peak, both beside GD's. None is drawn where nothing was seen."""
    seen = [
        row for row in rows if row.time_ratio is not None and row.above_gd_bytes_a_regularized_parameter is not None
    ]
    heads = [
        "contestant",
        "times_gd_10",
        "times_gd",
        "times_gd_90",
        "peak_bytes",
        "above_gd_bytes",
        "bytes_a_parameter",
    ]
    numbers = [
        [
            row.contestant,
            *row.time_ratio,
            row.peak_allocation_bytes,
            row.peak_above_gd_bytes,
            row.above_gd_bytes_a_regularized_parameter,
        ]
        for row in seen
    ]
    write_csv(path, heads, numbers)
    if not seen:
        return
    with picture(path, height=5.6) as axes:
        # by number: names of contestants that are near each other would overlap
        for place, row in enumerate(seen, start=1):
            low, median, high = row.time_ratio
            ours = row.contestant.startswith("one backward")
            colour = LOST if ours else PLAIN if row.contestant in ("gd", "gd compiled", "peer") else GAINED
            x, error = row.above_gd_bytes_a_regularized_parameter, [[median - low], [high - median]]
            label = f"{place}  {row.contestant}"
            axes.errorbar(x, median, error, fmt="o", color=colour, elinewidth=1, label=label)
            axes.annotate(str(place), (x, median), xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.axhline(1.0, color=PLAIN, linewidth=1, linestyle=":")
        axes.margins(0.15)
        axes.set_xlabel("peak above GD's, bytes a regularised parameter")
        axes.set_ylabel("time of a step, × GD")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.15), ncols=2, fontsize=8, handlelength=1.0)
        titled(axes, rows[0].case)


def against(path: Path, title: str, panels: list) -> None:
    """The penalty's seconds against what they grow with, and the straight lines through them; see step_scaling.Line."""
    heads = ["series", "x", "x_is", "penalty_seconds", "share_of_gd", "slope", "intercept", "r_squared"]
    numbers = [
        [line.name, x, line.unit, seconds, share, line.slope, line.intercept, line.r_squared]
        for line in panels
        for x, seconds, share in zip(line.x, line.seconds, line.shares, strict=True)
    ]
    write_csv(path, heads, numbers)
    drawn = [line for line in panels if line.x]
    if not drawn:
        return
    with picture(path, height=2.7 * len(drawn) + 0.5, panels=len(drawn)) as axes:
        axes = [axes] if len(drawn) == 1 else axes
        for axis, line in zip(axes, drawn, strict=True):
            axis.plot(line.x, line.seconds, "o", color=LOST)
            if line.slope is not None:
                ends = [0, max(line.x)]
                axis.plot(ends, [line.intercept + line.slope * x for x in ends], color=LOST, linewidth=1)
            for x, seconds, share in zip(line.x, line.seconds, line.shares, strict=True):
                label = f"{100 * share:.0f} %"
                axis.annotate(label, (x, seconds), xytext=(4, -11), textcoords="offset points", fontsize=8)
            fit = "" if line.r_squared is None else f", R² = {short(line.r_squared)}"
            axis.set_title(f"{line.held}{fit}", fontsize=9)
            axis.set_xlabel(line.unit)
            axis.set_ylabel("penalty, s a step")
            axis.set_ylim(min(0.0, *line.seconds), 1.12 * max(0.0, *line.seconds))
        titled(axes[0], title)
