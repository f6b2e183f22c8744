"""What the penalty's cost grows with: parameters, tokens, number of tensors, one at a time."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from rows import write_rows
from step_case import Case
from step_figures import against
from step_report import StepRow, table
from step_run import Plan, measure

# cases of a series, as changes of the first case, and what they say of themselves
ON_CPU = {"parameters": ("25m", "50m", "100m", "200m", "400m"), "tokens": (32, 64, 128, 256), "at": "100m"}
ON_GPU = {"parameters": ("100m", "200m", "400m", "1b", "3b"), "tokens": (64, 128, 256, 512, 1024), "at": "1b"}
QUICK = {"parameters": ("tiny", "25m"), "tokens": (8, 16), "at": "tiny"}
TENSORS = ("51m/28", "51m/112", "51m/448")


@dataclass
class Line:
    """Points of a series, and the straight line of least squares through seconds(x); None where points are too few."""

    name: str
    unit: str
    held: str
    x: list[float]
    seconds: list[float]
    shares: list[float]
    slope: float | None = None
    intercept: float | None = None
    r_squared: float | None = None

    def __post_init__(self):
        if len(set(self.x)) < 2:
            return
        self.slope, self.intercept = statistics.linear_regression(self.x, self.seconds)
        # two points are always on a line
        if len(self.x) > 2 and len(set(self.seconds)) > 1:
            self.r_squared = statistics.correlation(self.x, self.seconds) ** 2


def series_of(case: Case, quick: bool) -> dict[str, tuple[str, str, list[Case]]]:
    """{name: (what x is, what is held, cases)}."""
    points = QUICK if quick else ON_GPU if case.device == "cuda" else ON_CPU
    rows = f"{case.batch} + {case.batch} rows"
    lengths = [length for length in points["tokens"] if length > case.answer_tokens]
    found = {
        "parameters": (
            "regularised parameters",
            f"{rows} of {case.length} tokens",
            [replace(case, size=size) for size in points["parameters"]],
        ),
        "tokens": (
            "tokens of a step",
            f"model {points['at']}, {rows}",
            [replace(case, size=points["at"], length=length) for length in lengths],
        ),
    }
    if not quick:
        cases = [replace(case, size=size) for size in TENSORS]
        found["tensors"] = "tensors", f"51 M parameters, {rows} of {case.length} tokens", cases
    return found


def line_of(name: str, unit: str, held: str, rows: list[StepRow]) -> Line:
    column = {"parameters": "regularized_parameters", "tokens": "tokens", "tensors": "tensors"}[name]
    seen = [row for row in rows if row.extra_seconds is not None]
    xs = [float(getattr(row, column)) for row in seen]
    return Line(name, unit, held, xs, [row.extra_seconds for row in seen], [row.time_ratio[1] - 1 for row in seen])


def scaling(first: Case, names: list[str], plan: Plan, file: Path) -> None:
    """Prints a table and a line for each series of each contestant; rows, picture and its numbers go to files."""
    rows = []
    for contestant in names:
        lines = []
        for name, (unit, held, cases) in series_of(first, plan.quick).items():
            measured = []
            for case in cases:
                measured += measure(case, [contestant], plan)
                table(measured[-1:])
            rows += measured
            write_rows(file.with_suffix(".json"), rows)
            lines.append(line_of(name, unit, held, measured))
        print(f"\n### {contestant}: seconds of the penalty, beside GD's step\n")
        print_lines(lines)
        suffix = "_".join(contestant.replace(",", "").replace("=", " ").split())
        against(file.with_name(f"{file.name}_{suffix}.png"), f"{contestant}, {first.dtype}, {first.regime}", lines)
    print(f"\nRows in {file.with_suffix('.json')}")


def print_lines(lines: list[Line]) -> None:
    print("| against | held | points: s (share of GD) | slope, ns each | intercept, ms | R² |")
    print("|---|---|---|--:|--:|--:|")
    for line in lines:
        points = ", ".join(
            f"{x:.4g}: {seconds:.4g} ({100 * share:.1f} %)"
            for x, seconds, share in zip(line.x, line.seconds, line.shares, strict=True)
        )
        fit = ["–"] * 3
        if line.slope is not None:
            r_squared = "–" if line.r_squared is None else f"{line.r_squared:.3f}"
            fit = [f"{1e9 * line.slope:.4g}", f"{1e3 * line.intercept:.4g}", r_squared]
        print("| " + " | ".join([line.unit, line.held, points or "none measured", *fit]) + " |", flush=True)
