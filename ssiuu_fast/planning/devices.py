"""What a device can do: published limits of a few GPUs, measured ones of the processor here."""

import time
from dataclasses import dataclass

import torch

# bytes and elements that are large enough to leave the caches
_COPY_ELEMENTS = 64 * 1024 * 1024
_MATRIX = 2048
_SECONDS = 0.3


@dataclass(frozen=True)
class Device:
    """memory: bytes, None where none is known. bandwidth: bytes a second. flops: operations a second by dtype.

    The flops are those of dense matrix products, float32 without TF32 (torch's default), bfloat16 on the tensor cores.
    """

    name: str
    memory: float | None
    bandwidth: float
    flops: dict[str, float]
    source: str = "published"


def _published(name: str, gigabytes: float, gigabytes_a_second: float, float32: float, bfloat16: float) -> Device:
    flops = {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}
    return Device(name, gigabytes * 1e9, gigabytes_a_second * 1e9, flops)


# NVIDIA's data sheets, SXM forms, without sparsity; a gigabyte is taken as 10^9 bytes, which leaves a few percent for
# the driver's own memory
PUBLISHED = {
    device.name: device
    for device in (
        _published("A100-80", 80, 2039, 19.5, 312),
        _published("H100", 80, 3350, 67, 989),
        _published("H200", 141, 4800, 67, 989),
        _published("B200", 180, 8000, 75, 2250),
        _published("RTX-4090", 24, 1008, 82.6, 165),
        _published("RTX-5090", 32, 1792, 104.8, 209),
    )
}


def measured_cpu() -> Device:
    """The processor here: its own copy and matrix product, the best of a few within a second."""
    source = torch.ones(_COPY_ELEMENTS)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    flops = {}
    for name in ("float32", "bfloat16"):
        matrix = torch.ones(_MATRIX, _MATRIX, dtype=getattr(torch, name))
        flops[name] = 2 * _MATRIX**3 / _best(lambda matrix=matrix: matrix @ matrix)
    return Device("cpu", _host_memory(), bandwidth, flops, f"measured here, {torch.get_num_threads()} threads")


def _best(call) -> float:
    call()
    times = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < _SECONDS:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _host_memory() -> float | None:
    """Memory that is free here now; None where the system doesn't say."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    return None
