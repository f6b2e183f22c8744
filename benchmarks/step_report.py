"""Rows of benchmarks/step.py: made from what a process measured, judged, printed."""

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from rows import Row, quantiles
from step_case import Case

STATE_BYTES = {"one backward, 8-bit": 1.016, "one backward, bf16 state": 2.0, "one backward, offload": 0.0}
WIDTHS = {"float32": 4, "bfloat16": 2}


@dataclass
class StepRow(Row):
    """A contestant's step beside GD's. Seconds and ratios are 10 %, 50 % and 90 % quantiles over the rounds.

    A ratio is to GD's step in the same round, None where the rows weren't what the case is about (`no_ratio` says so).
    Memory is the peak of a step, model and optimizer included. Of a failed contestant everything is None.
    """

    seconds: tuple[float, float, float] | None
    gigabytes_per_second: float | None = None
    peak_allocation_bytes: int | None = None
    base_seconds: tuple[float, float, float] | None = None
    time_ratio: tuple[float, float, float] | None = None
    # other processes disturb it less; None on a GPU, whose time it isn't
    processor_time_ratio: float | None = None
    # median over the rounds of the difference to GD in the same round
    extra_seconds: float | None = None
    no_ratio: str = ""
    peak_above_gd_bytes: int | None = None
    above_gd_bytes_a_regularized_parameter: float | None = None
    parameters: int | None = None
    regularized_parameters: int | None = None
    tensors: int | None = None
    tokens: int | None = None
    rows: int | None = None
    rows_skipped: int | None = None
    smallest_target: float | None = None
    tolerance: float | None = None
    # what the regulariser says of its last penalty
    road: str = ""
    rows_taken: list[int] | None = None
    # R was that of Algorithm 1's transcription
    penalty_checked: bool = False
    setting: dict = field(default_factory=dict)
    clocks: str = ""
    failure: str = ""


KEPT = (
    "parameters regularized_parameters tensors tokens rows rows_skipped smallest_target tolerance road rows_taken "
    "penalty_checked hardware versions clocks failure"
).split()


def row_of(case: Case, contestant: str, found: dict, rounds: int, gd_peak: int | None) -> StepRow:
    """gd_peak: of the row `gd` of the case; None where it isn't known."""
    row = StepRow("step", case.name, contestant, None, rounds, threads=case.threads, setting=case.as_dict())
    for name in KEPT:
        if name in found:
            setattr(row, name, found[name])
    if "seconds" in found:
        mine, base = found["seconds"], found["base_seconds"]
        row.seconds, row.base_seconds = quantiles(mine), quantiles(base)
        row.no_ratio = why_no_ratio(case, row)
        if not row.no_ratio:
            row.time_ratio = quantiles(ratios(mine, base))
            row.extra_seconds = statistics.median(a - b for a, b in zip(mine, base, strict=True))
            if case.device == "cpu":
                processor = ratios(found["processor_seconds"], found["base_processor_seconds"])
                row.processor_time_ratio = statistics.median(processor)
    row.peak_allocation_bytes = found.get("peak")
    if row.peak_allocation_bytes is not None and gd_peak is not None:
        row.peak_above_gd_bytes = row.peak_allocation_bytes - gd_peak
        row.above_gd_bytes_a_regularized_parameter = row.peak_above_gd_bytes / row.regularized_parameters
    return row


def ratios(mine: list[float], base: list[float]) -> list[float]:
    return [a / b for a, b in zip(mine, base, strict=True)]


def why_no_ratio(case: Case, row: StepRow) -> str:
    """Why the rows aren't what the case is about, so that a ratio would be of something else; empty if they are."""
    wanted = 0 if case.regime == "noskip" else row.rows
    if row.rows_skipped != wanted:
        return f"{row.rows_skipped} of {row.rows} forget rows are under the tolerance, {wanted} should be"
    if row.rows_taken is not None:
        taken, rows = row.rows_taken
        if taken != (rows if case.regime == "noskip" else 0):
            return f"the road took {taken} of {rows} forget rows"
    return ""


def print_sight(rows: list[StepRow]) -> None:
    """Which forget rows take part, from the first row that knows."""
    for row in rows:
        if row.rows is not None:
            skipped = "all" if row.rows_skipped == row.rows else row.rows_skipped
            millions, regularized = row.parameters / 1e6, row.regularized_parameters / 1e6
            print(
                f"\nSmallest target {row.smallest_target:.3g} (log_probability counts as 1), tolerance "
                f"{row.tolerance:.3g}: {skipped} of {row.rows} forget rows skipped. {millions:.4g} M parameters, "
                f"{regularized:.4g} M regularised in {row.tensors} tensors; {row.tokens} tokens."
            )
            return


def table(rows: list[StepRow]) -> None:
    on_gpu = rows[0].setting["device"] != "cpu"
    print(f"\n### {rows[0].case}\n")
    heads = ["", "s a step (10–90 %)", "× gd (10–90 %)"]
    heads += ([] if on_gpu else ["× gd, processor"]) + ["peak MB", "above gd MB", "B a reg. parameter", "road"]
    print("| " + " | ".join(heads) + " |")
    print("|---|" + "--:|" * (len(heads) - 2) + "---|")
    for row in rows:
        cells = [row.contestant, spread(row.seconds), spread(row.time_ratio)]
        cells += [] if on_gpu else [number(row.processor_time_ratio, ".3f")]
        cells += [
            number(row.peak_allocation_bytes, ".1f", 1e6),
            number(row.peak_above_gd_bytes, ".1f", 1e6),
            number(row.above_gd_bytes_a_regularized_parameter, ".2f"),
            (row.failure or row.no_ratio or row.road or "").replace("|", "/"),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    print_sight(rows)


def number(value, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else format(value / unit, form)


def spread(triple) -> str:
    if triple is None:
        return "–"
    low, median, high = triple
    return f"{median:.3f} ({low:.3f}–{high:.3f})"


class Goal(NamedTuple):
    """Met, missed, or (None) not seen."""

    text: str
    met: bool | None

    def __str__(self):
        verdict = {True: "met", False: "MISSED", None: "not seen"}[self.met]
        return f"  {verdict:8}  {self.text}"


# the size from which the goals hold: below it the step isn't that of a model
LEAST_PARAMETERS = 100_000_000


def goals(case: Case, rows: list[StepRow]) -> list[Goal]:
    by_name = {row.contestant: row for row in rows}
    return _time_goals(case, by_name) + _memory_goals(case, by_name)


def _time_goals(case, by_name):
    if case.device == "cpu":
        most, every, stated = 1.22, 1.07, f"{LEAST_PARAMETERS // 10**6} M parameters or more"
        applies = any((row.parameters or 0) >= LEAST_PARAMETERS for row in by_name.values())
    else:
        most, every, stated = {256: 1.22, 1024: 1.18}.get(case.length), 1.06, "3b, bfloat16, 8 + 8 rows of 256 or 1024"
        applies = (case.size, case.dtype, case.batch) == ("3b", "bfloat16", 8) and most is not None
    limits = {"one backward": most, "one backward, every=4": every}
    if case.regime == "skip":
        limits = {"one backward": 1.05}
    if not applies:
        return [Goal(f"the goals of time are for {stated}", None)]
    return [
        _time_goal(f"{name}, {case.regime}, {case.target}", limit, by_name.get(name)) for name, limit in limits.items()
    ]


def _time_goal(what, limit, row):
    if row is None or row.time_ratio is None:
        why = "not run" if row is None else row.failure or row.no_ratio or "not timed"
        return Goal(f"{what}: goal {limit:.2f} x gd; {why}", None)
    ratio = row.time_ratio[1]
    by = "" if row.processor_time_ratio is None else f" ({row.processor_time_ratio:.3f} by processor time)"
    return Goal(f"{what}: {ratio:.3f} x gd{by}, goal {limit:.2f}", ratio <= limit)


def _memory_goals(case, by_name):
    found = []
    width = WIDTHS[case.dtype]
    for name in ("one backward", "one backward, 8-bit", "one backward, bf16 state", "one backward, offload"):
        row, gd = by_name.get(name), by_name.get("gd")
        if row is None or gd is None or (row.failure and case.device == "cpu" and name.endswith("offload")):
            continue
        if row.peak_above_gd_bytes is None:
            found.append(Goal(f"{name}: peak above gd ({row.failure or 'not measured'})", None))
            continue
        elements = row.regularized_parameters
        state = STATE_BYTES.get(name, width) * elements
        share = 0.01 if case.device != "cpu" and name == "one backward, 8-bit" else 0.02
        allowed = state + share * gd.peak_allocation_bytes
        what = f"references + {share:.0%} of gd's peak"
        if case.micro_batches > 1:
            allowed += width * elements
            what += " + one buffer of g"
        text = f"{name}: peak {row.peak_above_gd_bytes / 1e6:.1f} MB above gd, goal {allowed / 1e6:.1f} MB ({what})"
        if (row.parameters or 0) < 1e6:
            found.append(Goal(f"{name}: peak above gd (too small a model to tell)", None))
        else:
            found.append(Goal(text, row.peak_above_gd_bytes <= allowed))
    return found
