"""Plain-text tables and the sentence under them."""

import statistics
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(cells)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def mean_sd(values: Sequence[float | None]) -> str:
    """ "0.42 ± 0.03" (sample standard deviation), "0.42" of a single value, "–" where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.2f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f}"


def comparison(name: str, ours: Sequence[float], other_name: str, other: Sequence[float]) -> str:
    """Says in words which of two sets of recovered scores is lower, and whether by more than their spread."""
    difference = statistics.mean(ours) - statistics.mean(other)
    spread = max(statistics.stdev(values) if len(values) > 1 else 0.0 for values in (ours, other))
    if abs(difference) <= spread:
        note = f"({difference:+.2f}, sd {spread:.2f})"
        return f"{name} and {other_name} do not differ by more than the spread between seeds {note}"
    return f"{name} recovers {abs(difference):.2f} {'less' if difference < 0 else 'MORE'} than {other_name}"
