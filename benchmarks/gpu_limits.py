"""What the memory of this device gives: the limits that benchmarks/gpu.py measures others by."""

import torch
from case import about_device
from rows import DeviceRow
from stopwatch import Stopwatch, race


def measure(stopwatch: Stopwatch, rounds: int, *, tiny: bool) -> list[DeviceRow]:
    """Rows of torch's copy, in bytes read and written, and of reading alone."""
    elements = 1 << (16 if tiny else 30)
    source = torch.randn(elements, device=stopwatch.device)
    target = torch.empty_like(source)
    contestants = {
        "copy, torch": lambda: target.copy_(source),
        "read, torch.amax": lambda: source.amax(),
        "read, torch.sum": lambda: source.sum(),
    }
    if stopwatch.on_gpu:
        from read_kernel import largest

        contestants["read, Triton"] = lambda: largest(source)
    measured = race(stopwatch, contestants, lambda: None, rounds)
    about = about_device(stopwatch)
    rows = []
    for name, seen in measured.items():
        case = f"{source.nbytes / 2**30:.3g} GiB fp32"
        failure = seen.failure or ("" if seen.seconds else "the host took longer than the device")
        if failure:
            rows.append(DeviceRow("limit", case, name, None, rounds, None, 0, failure=failure, **about))
            continue
        traffic = source.nbytes * (2 if name.startswith("copy") else 1)
        speed = traffic / seen.seconds[1] / 1e9
        rows.append(DeviceRow("limit", case, name, seen.seconds, seen.rounds, speed, seen.peak, **about))
        rows[-1].call_seconds = seen.call_seconds
    return rows


def limits_of(rows: list[DeviceRow]) -> dict[str, float]:
    """GB/s of the copy and of the fastest read."""
    return {
        kind: max(row.gigabytes_per_second or 0.0 for row in rows if row.contestant.startswith(kind))
        for kind in ("copy", "read")
    }
