"""Rows of benchmarks/step.py, each from processes of its own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from step_case import Case
from step_report import StepRow, row_of

WORKER = Path(__file__).with_name("step_worker.py")


@dataclass(frozen=True)
class Plan:
    """How rows are measured: rounds of a timing, seconds after which a process is stopped."""

    rounds: int = 7
    limit: float = 1800.0
    time: bool = True
    peak: bool = True
    # both in one process on the CPU too, whose peak then holds what the times left behind
    quick: bool = False

    def processes(self, case: Case) -> list[list[str]]:
        """What is measured in each process of a row. Resident memory wants one of its own, an allocator doesn't."""
        wanted = ["peak"] * self.peak + ["time"] * self.time
        return [wanted] if case.device == "cuda" or self.quick else [[measure] for measure in wanted]


def in_a_process(case: Case, contestant: str, measures: list[str], rounds: int, limit: float) -> dict:
    """What step_worker.py found; {"failure": why} where it died."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    if measures == ["peak"]:
        # what is freed goes back at once, whatever its size from 64 kB on
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    told = {"case": case.as_dict(), "contestant": contestant, "measures": measures, "rounds": rounds}
    command = [sys.executable, str(WORKER), json.dumps(told)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failure": f"took longer than {limit:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"failure": f"ended with {done.returncode}: {said[-1][:160] if said else 'killed'}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, names: list[str], plan: Plan) -> list[StepRow]:
    """A row each; `gd`, if it is there, comes first: the others' memory is given above its own."""
    rows: list[StepRow] = []
    gd_peak = None
    for name in names:
        start = time.perf_counter()
        found: dict = {}
        for measures in plan.processes(case):
            found |= in_a_process(case, name, measures, plan.rounds, plan.limit)
            if found.get("failure"):
                break
        if name == "gd":
            gd_peak = found.get("peak")
        rows.append(row_of(case, name, found, plan.rounds, gd_peak))
        print(f"  {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows
