"""What all pictures share: their size and colours, and how they and their numbers are written."""

import csv
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

# inches. Letters of 10.5 points in a picture this wide are still 9 points high on a phone, 360 pixels across
WIDTH = 4.3
TITLE_LETTERS = 45
MINUS = "\N{MINUS SIGN}"
# of Okabe and Ito: told apart by colour-blind readers, and in grey
LOST, GAINED = "#0072B2", "#D55E00"
BEFORE, AFTER, ATTACKED, PLAIN = "#555555", "#009E73", "#CC79A7", "#8C8C8C"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "lines.linewidth": 2,
    # letters are drawn as shapes: the same everywhere, whatever fonts a reader has
    "svg.fonttype": "path",
    # the same numbers give the same file
    "svg.hashsalt": "ssiuu-fast",
}


@contextmanager
def picture(path: Path, height: float, panels: int = 1):
    """Yields the axes of a new picture (a list of them for several panels, one under another), and writes it to path.

    The suffix of path says how, svg or png. No window system is needed, and matplotlib is loaded here, not on import.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        yield axes[0] if panels == 1 else list(axes)
        # of an svg, a date would make every file another
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def titled(axes, text: str) -> None:
    """The title of a picture: over its whole width, and broken into lines where that is not enough."""
    title = "\n".join(textwrap.wrap(text, TITLE_LETTERS))
    axes.figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def legend_below(axes, columns: int) -> None:
    """A legend under the axis, where it can't cover data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=columns, handlelength=1.5, columnspacing=1.2)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """The numbers of a picture, beside it: the name of path with .csv."""
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def short(value: float) -> str:
    """A number in three digits as a person writes it: 0.0042, 4.77, 353, 1.2e-05."""
    if value != value:
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", MINUS)
