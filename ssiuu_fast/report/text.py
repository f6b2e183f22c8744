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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for the deviation of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_sd(values: Sequence[float]) -> str:
    """ "0.42 ± 0.03", or "0.42" of a single value."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f} ± {deviation:.2f}" if len(values) > 1 else f"{mean:.2f}"


def comparison(name: str, ours: Sequence[float], other_name: str, other: Sequence[float]) -> str:
    """Says in words which of two sets of recovered scores is lower, and whether by more than their spread."""
    (ours_mean, ours_sd), (other_mean, other_sd) = mean_and_deviation(ours), mean_and_deviation(other)
    difference, spread = ours_mean - other_mean, max(ours_sd, other_sd)
    if abs(difference) <= spread:
        note = f"({difference:+.2f}, sd {spread:.2f})"
        return f"{name} and {other_name} do not differ by more than the spread between seeds {note}"
    return f"{name} recovers {abs(difference):.2f} {'less' if difference < 0 else 'MORE'} than {other_name}"
