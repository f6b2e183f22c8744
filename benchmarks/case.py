"""A case of benchmarks/gpu.py: contestants that do the same, how they are checked, timed and judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rows import DeviceRow, gpu_clocks, gpu_versions, hardware
from stopwatch import MOST_SECONDS, Stopwatch, race, reason, release_memory
from torch import Tensor


class Part(NamedTuple):
    """A tensor of an outcome, and how far another contestant's may be from it: relatively, and at how many elements
    more than that."""

    tensor: Tensor
    tolerance: float
    exceptions: float = 0.0


@dataclass
class Case:
    """outcome(result) gives what a call wrote and returned; all contestants but `unchecked` must agree with `truth`."""

    benchmark: str
    name: str
    contestants: dict[str, Callable | None]  # None: it has no form for this case
    restore: Callable
    outcome: Callable[[object], list[Part]]
    truth: str
    traffic: int  # bytes that the operator has to move
    limit: str  # "copy" or "read"
    baselines: tuple[str, ...]  # speeds are given as multiples of theirs
    goals: dict[str, float]  # least share of the limit, least multiple of a baseline
    goals_of: tuple[str, ...]
    unchecked: tuple[str, ...] = ()
    by_call: bool = False  # multiples are of the whole call, not of the device's time
    state_bytes_per_parameter: float | None = None


def compile_for(device: torch.device, function: Callable, *, dynamic: bool) -> Callable:
    """torch.compile; without Inductor on the CPU, where only the way through it is looked at."""
    # earlier cases count towards the limit of recompilations of a function
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    # fullgraph: past that limit it is to fail, instead of running uncompiled
    return torch.compile(function, dynamic=dynamic, fullgraph=True, backend=backend)


def _copied(parts):
    return [part._replace(tensor=part.tensor.clone()) for part in parts]


def disagreement(mine: list[Part], truth: list[Part]) -> str:
    """Where two outcomes differ by more than they may; empty if nowhere. NaN never agrees."""
    shares = []
    for one, other in zip(mine, truth, strict=True):
        x, y = one.tensor.float(), other.tensor.float()
        wrong = ~((x - y).abs() <= other.tolerance * (1 + y.abs()))
        shares.append(wrong.sum().double() / max(1, wrong.numel()))
    shares = torch.stack(shares).tolist()
    for i, (share, part) in enumerate(zip(shares, truth, strict=True)):
        if share > part.exceptions:
            return f"{share:.2%} of the elements of output {i} of {len(shares)} are wrong"
    return ""


def check(case: Case) -> dict[str, str]:
    """Why each contestant that can't run, or doesn't agree with the truth, must not be timed."""
    failures = {name: "has no form for this case" for name, call in case.contestants.items() if call is None}
    case.restore()
    truth = _copied(case.outcome(case.contestants[case.truth]()))
    for name, call in case.contestants.items():
        if call is None or name in (case.truth, *case.unchecked):
            continue
        try:
            case.restore()
            difference = disagreement(case.outcome(call()), truth)
            if difference:
                failures[name] = f"wrong: {difference}"
        except Exception as error:
            failures[name] = reason(error)
            release_memory()
    del truth
    release_memory()
    return failures


def run(case: Case, stopwatch: Stopwatch, rounds: int, most_seconds: float = MOST_SECONDS) -> list[DeviceRow]:
    """Check, then time; one row a contestant, failed ones too."""
    failures = check(case)
    timed = {name: call for name, call in case.contestants.items() if name not in failures}
    measured = race(stopwatch, timed, case.restore, rounds, most_seconds)
    about = about_device(stopwatch)
    rows = []
    for name in case.contestants:
        failure = failures.get(name) or measured[name].failure
        if failure:
            row = DeviceRow(case.benchmark, case.name, name, None, rounds, None, 0, failure=failure, **about)
        else:
            seen = measured[name]
            speed = case.traffic / seen.seconds[1] / 1e9 if seen.seconds else None
            row = DeviceRow(case.benchmark, case.name, name, seen.seconds, seen.rounds, speed, seen.peak, **about)
            row.call_seconds = seen.call_seconds
        row.state_bytes_per_parameter = case.state_bytes_per_parameter
        rows.append(row)
    return rows


def about_device(stopwatch: Stopwatch) -> dict:
    if not stopwatch.on_gpu:
        return {"hardware": hardware(), "versions": gpu_versions()}
    name = torch.cuda.get_device_name(stopwatch.device)
    return {"hardware": name, "versions": gpu_versions(), "clocks": stopwatch.under_load(gpu_clocks)}
