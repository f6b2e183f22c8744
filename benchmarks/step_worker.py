"""What one process of benchmarks/step.py measures: a contestant's time beside GD's own, or its peak memory.

    python benchmarks/step_worker.py '{"case": {...}, "contestant": "plain", "measures": ["time"], "rounds": 7}'

The last line printed is what was measured, in JSON.
"""

import ctypes
import gc
import importlib.metadata
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rows import gpu_clocks, gpu_versions, hardware, versions
from step_case import Case, Setup, twin_of
from step_contestants import CONTESTANTS, NotHere, Plain, Step
from stopwatch import reason, release_memory


class Wrong(Exception):
    """A contestant that doesn't do what it is to do."""


def run(case: Case, contestant: str, measures: list[str], rounds: int) -> dict:
    """What the row needs, or what was had before it failed and "failure": why."""
    torch.set_num_threads(case.threads)
    found = about_machine(case)
    try:
        for measure in measures:
            found |= measure_time(case, contestant, rounds) if measure == "time" else measure_peak(case, contestant)
            release_memory()
    except NotHere as error:
        return found | {"failure": str(error)}
    except Wrong as error:
        return found | {"failure": f"wrong: {error}"}
    except Exception as error:
        return found | {"failure": reason(error)}
    return found


def about_machine(case: Case) -> dict:
    about = versions() | {"transformers": importlib.metadata.version("transformers")}
    if case.device == "cpu":
        return {"hardware": hardware(), "versions": about}
    return {"hardware": torch.cuda.get_device_name(), "versions": gpu_versions() | about}


def measure_time(case: Case, contestant: str, rounds: int) -> dict:
    """Rounds in which GD alone and the contestant each do the same steps, first one and then the other in front."""
    setup = Setup(case)
    about = setup.counts() | setup.sight()
    base = Step(setup, twin_of(setup.model, case))
    mine = CONTESTANTS[contestant](setup)
    expected = None if mine.penalty_tolerance is None else penalty_by_transcription(setup)
    number = begin(mine, expected)
    # the base's warm-up
    cycle(base, number)
    seconds = {base: [], mine: []}
    processor = {base: [], mine: []}
    for turn in range(rounds):
        for step in (base, mine) if turn % 2 == 0 else (mine, base):
            used = time.process_time()
            wait(setup.device)
            start = time.perf_counter()
            cycle(step, number, mine.period)
            wait(setup.device)
            seconds[step].append((time.perf_counter() - start) / mine.period)
            processor[step].append((time.process_time() - used) / mine.period)
        number += mine.period
    return about | {
        "clocks": gpu_clocks() if case.device == "cuda" else "",
        "seconds": seconds[mine],
        "base_seconds": seconds[base],
        "processor_seconds": processor[mine],
        "base_processor_seconds": processor[base],
        "road": mine.road(),
        "rows_taken": mine.rows_taken(),
        "penalty_checked": expected is not None,
    }


def cycle(step: Step, number: int, steps: int = 1) -> None:
    for index in range(number, number + steps):
        step(index)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def begin(step: Step, expected: float | None) -> int:
    """Runs a whole cycle and one step more, so that there is a reference and a penalty; the number of steps run.

    Raises Wrong where the penalty isn't the transcription's.
    """
    # the second step with a penalty works on the second batch, whatever the period
    for number in range(step.period + 1):
        step(number)
    if expected is not None:
        found = float(step.penalty)
        # the transcription rounds every line to the weights' dtype
        rounding = 2 * torch.finfo(getattr(torch, step.setup.case.dtype)).eps
        if not abs(found - expected) <= max(step.penalty_tolerance, rounding) * abs(expected):
            raise Wrong(f"R = {found:.6g} in the second step with a penalty, {expected:.6g} by the transcription")
    if step.period == 1:
        return 2
    # to the end of a cycle
    cycle(step, step.period + 1, step.period - 1)
    return 2 * step.period


def penalty_by_transcription(setup: Setup) -> float | None:
    """R of Algorithm 1 on the second batch after the first; None where there is no memory for it."""
    plain = Plain(setup, twin_of(setup.model, setup.case))
    try:
        cycle(plain, 0, 2)
        return float(plain.penalty)
    except torch.OutOfMemoryError:
        return None
    finally:
        del plain
        release_memory()


def measure_peak(case: Case, contestant: str) -> dict:
    """Bytes by which memory rises at most during a whole cycle, above what was there before the model was built.

    On a GPU what its allocator counts, elsewhere resident memory (Linux: VmHWM). What is loaded late, and what
    compiling takes, comes before: a tiny model's steps, and this one's own first cycle.
    """
    begin(CONTESTANTS[contestant](Setup(replace(case, size="tiny", layers=None))), None)
    release_memory()
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
    else:
        give_back_heap()
        before = resident("VmRSS")
    setup = Setup(case)
    about = setup.counts()
    step = CONTESTANTS[contestant](setup)
    number = begin(step, None)
    gc.collect()
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        cycle(step, number, step.period)
        torch.cuda.synchronize()
        return about | {"peak": torch.cuda.max_memory_allocated() - before}
    give_back_heap()
    Path("/proc/self/clear_refs").write_text("5")
    cycle(step, number, step.period)
    return about | {"peak": resident("VmHWM") - before}


def give_back_heap() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def main():
    told = json.loads(sys.argv[1])
    found = run(Case(**told["case"]), told["contestant"], told["measures"], told["rounds"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
