"""How fast are the operators on this GPU, against plain torch, torch.compile, and the limit of its memory?

    python benchmarks/gpu.py [--rounds 20] [--seconds 10] [--json benchmarks/results/NAME.json]
    python benchmarks/gpu.py --device cpu        a few small sizes, to see that this program works

Contestants take turns round by round in one process; buffers are restored and the cache is flushed before every call,
outside the clock; compiling and tuning come before. Every contestant must agree with the eager one, or it isn't timed.
One that takes longer than --seconds in a case has fewer rounds, and says how many. Clocks are read under load.

GPU ms are the device's own, behind a sleep long enough for the host to enqueue the call (about a thousand launches
fit): what a call adds to a step in which the device is behind. – where the host wasn't done when the sleep was over,
and would have been timed. Call ms are on an idle device, the host's checks and
launches included. GB/s count the bytes that the operator has to move, for every contestant alike. Peak is what a call
allocates beside its tensors. x is how many times as fast as a baseline, in GPU ms; for small tensors in call ms, and
where one of both has no GPU ms, which is then said.
The transcription, eager and compiled, has neither the guard against non-finite elements nor the gradient's norm.
"""

import argparse
import re
import time
from pathlib import Path
from typing import NamedTuple

import gpu_limits
import gpu_neurons
import gpu_penalty
import gpu_weight_gradient
import torch
from case import Case, run
from rows import DeviceRow, gpu_clocks, gpu_versions, hardware, write_rows
from stopwatch import MOST_SECONDS, Stopwatch, reason, release_memory

RESULTS = Path(__file__).parent / "results"


def milliseconds(seconds) -> str:
    if seconds is None:
        return "–"
    low, median, high = (1e3 * second for second in seconds)
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def table(heads: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("|---|" + "--:|" * (len(heads) - 1))
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


def print_limits(rows: list[DeviceRow]) -> None:
    print(f"\n### Limits, {rows[0].case}\n")
    lines = [
        [row.contestant, row.failure, ""]
        if row.failure
        else [row.contestant, milliseconds(row.seconds), f"{row.gigabytes_per_second:.0f}"]
        for row in rows
    ]
    table(["", "GPU ms (10–90 %)", "GB/s"], lines)


class Ratio(NamedTuple):
    """How many times as fast, and what is said of the times that were compared."""

    value: float
    remark: str

    def __str__(self):
        return f"{self.value:.2f}{self.remark}"


def times_as_fast(row: DeviceRow, rows: dict[str, DeviceRow], baseline: str, by_call: bool) -> Ratio | None:
    """How many times as fast as the baseline; None if one of them failed."""
    other = rows[baseline]
    if row.failure or other.failure:
        return None
    if not by_call and row.seconds and other.seconds:
        return Ratio(other.seconds[1] / row.seconds[1], "")
    return Ratio(other.call_seconds[1] / row.call_seconds[1], "" if by_call else " (call)")


def share_of_limit(row: DeviceRow, limit: float) -> float | None:
    return row.gigabytes_per_second / limit if limit and row.gigabytes_per_second else None


def contestant(row: DeviceRow, rounds: int) -> str:
    return row.contestant + (f", {row.rounds} rounds" if row.rounds < rounds else "")


def print_case(case: Case, rows: list[DeviceRow], limits: dict[str, float], rounds: int) -> None:
    print(f"\n### {case.benchmark}, {case.name}\n")
    by_name = {row.contestant: row for row in rows}
    lines = []
    for row in rows:
        if row.failure:
            lines.append([row.contestant, row.failure.replace("|", "/")] + [""] * (4 + len(case.baselines)))
            continue
        share = share_of_limit(row, limits[case.limit])
        ratios = [times_as_fast(row, by_name, baseline, case.by_call) for baseline in case.baselines]
        lines.append(
            [
                contestant(row, rounds),
                milliseconds(row.seconds),
                milliseconds(row.call_seconds),
                f"{row.gigabytes_per_second:.0f}" if row.gigabytes_per_second else "–",
                "–" if share is None else f"{100 * share:.0f}",
                *("–" if ratio is None else str(ratio) for ratio in ratios),
                f"{row.peak_allocation_bytes / 1e6:.1f}",
            ]
        )
    heads = ["", "GPU ms (10–90 %)", "call ms", "GB/s", f"% of {case.limit}"]
    table(heads + [f"× {baseline}" for baseline in case.baselines] + ["peak MB"], lines)
    if case.state_bytes_per_parameter is not None:
        print(f"\nReferences: {case.state_bytes_per_parameter:.2f} bytes a parameter.")
    print_goals(case, by_name, limits)


def print_goals(case: Case, by_name: dict[str, DeviceRow], limits: dict[str, float]) -> None:
    print()
    for name in case.goals_of:
        row = by_name[name]
        if row.failure:
            continue
        for against, least in case.goals.items():
            if against == "limit":
                value, what = share_of_limit(row, limits[case.limit]), f"of {case.limit}"
            else:
                ratio = times_as_fast(row, by_name, against, case.by_call)
                value, what = (ratio.value, f"× {against}{ratio.remark}") if ratio else (None, "")
            if value is not None:
                met = "met" if value >= least else "MISSED"
                print(f"- {name}: {value:.2f} {what}, goal at least {least:g}: {met}", flush=True)


def measure(make, stopwatch: Stopwatch, args, limits: dict[str, float]) -> list[DeviceRow]:
    """The rows of one case, printed; none where its tensors don't fit."""
    release_memory()
    try:
        case = make()
        rows = run(case, stopwatch, args.rounds, args.seconds)
    except Exception as error:
        print(f"\nA case was left out: {reason(error)}", flush=True)
        return []
    print_case(case, rows, limits, args.rounds)
    return rows


def result_file(device) -> Path | None:
    if device.type != "cuda":
        return None
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    return RESULTS / f"{name}.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="the most a contestant takes of a case")
    parser.add_argument(
        "--json", type=Path, help="write the rows to this file; for a GPU, else results/<its name>.json"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch.cuda finds no CUDA device here; --device cpu shows that this program works")
    start = time.perf_counter()
    device = torch.device(args.device)
    tiny = args.device == "cpu"
    # on the CPU "cuda" stands for a contestant that can't run
    backends = ("cpp", "reference", "cuda") if tiny else ("cuda", "triton")
    file = args.json or result_file(device)
    torch.manual_seed(0)

    names = ", ".join(f"{name} {version}" for name, version in gpu_versions().items())
    stopwatch = Stopwatch(device)
    what = hardware()
    if not tiny:
        what = f"{torch.cuda.get_device_name(device)}, clocks under load {stopwatch.under_load(gpu_clocks)}"
    print(f"{what}; {names}; medians of {args.rounds} rounds")
    rows = gpu_limits.measure(stopwatch, args.rounds, tiny=tiny)
    limits = gpu_limits.limits_of(rows)
    print_limits(rows)
    for module in (gpu_neurons, gpu_penalty, gpu_weight_gradient):
        for make in module.cases(device, backends, tiny=tiny):
            rows += measure(make, stopwatch, args, limits)
            if file:
                # after every case, so that a run that is stopped keeps what it has
                write_rows(file, rows)
    print(f"\n{time.perf_counter() - start:.0f} s in all" + (f"; rows in {file}" if file else ""))


if __name__ == "__main__":
    main()
