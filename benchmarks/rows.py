"""A benchmark's row: what was measured, in quantiles, and on what."""

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

import ssiuu_fast


def hardware() -> str:
    """Processor and number of cores this process may use, as in '2 cores of AMD EPYC'."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {_processor()}"


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {"ssiuu_fast": ssiuu_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}


@functools.cache
def gpu_versions() -> dict[str, str]:
    """versions(), and those of CUDA, its driver and Triton."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return versions() | {"cuda": torch.version.cuda, "driver": _nvidia_smi("driver_version"), "triton": triton}


def gpu_clocks() -> str:
    """Clocks of SM and memory as they are now, as in '1980 MHz, 3201 MHz'; unknown where nvidia-smi doesn't say."""
    return _nvidia_smi("clocks.sm,clocks.mem")


def _nvidia_smi(fields):
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = said.stdout.strip().splitlines()
    return lines[0].strip() if said.returncode == 0 and lines else "unknown"


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Row:
    """Times of one contestant on one case; seconds are the 10 %, 50 % and 90 % quantiles over the rounds."""

    benchmark: str
    case: str
    contestant: str
    seconds: tuple[float, float, float]
    rounds: int
    gigabytes_per_second: float
    peak_allocation_bytes: int
    threads: int = field(default_factory=torch.get_num_threads)
    hardware: str = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=versions)
    timestamp: str = field(default_factory=now)

    @property
    def median(self) -> float:
        return self.seconds[1]


@dataclass
class DeviceRow(Row):
    """A row of benchmarks/gpu.py. seconds are the device's own.

    None where the contestant failed, and `failure` says why; or where the host's could not be kept out of them.
    """

    seconds: tuple[float, float, float] | None
    gigabytes_per_second: float | None
    # on an idle device, the host's work before the first launch and between launches included
    call_seconds: tuple[float, float, float] | None = None
    state_bytes_per_parameter: float | None = None
    failure: str = ""
    clocks: str = ""


def quantiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return (times[0],) * 3
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
