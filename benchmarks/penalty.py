"""How fast is penalty_ on the CPU, against plain torch, torch.compile, and the limit of this machine's memory?

    python benchmarks/penalty.py [--elements 100000000] [--rounds 9] [--threads 2] [--json rows.json]

The limit is a C++ loop over the same buffers, chunks and threads that reads three and rewrites two with one
exclusive or each. Contestants take turns round by round in one process, and buffers are restored before every call,
outside the clock. GB/s counts the five passes over memory that the operator needs, for every contestant alike.
Allocation is the growth of the process's peak resident memory during one call (Linux: VmHWM, reset before; freed heap
is handed back first, so that reused memory counts too).
"""

import argparse
import ctypes
import re
import time
from pathlib import Path

import torch
from rows import Row, hardware, quantiles, versions, write_rows

from ssiuu_fast import _C
from ssiuu_fast.ops import penalty_
from ssiuu_fast.ops.checks import DTYPE_CODES

WEIGHT = 0.1


def transcription(gradient, parameter, reference):
    """Algorithm 1 as one would write it down, in fp32 as the operator computes."""
    g = gradient.float()
    attribution = parameter.float() * g
    negative = attribution < 0
    difference = torch.where(negative, attribution - reference.float(), 0)
    gradient.copy_(WEIGHT * 2 * difference * g)
    reference.copy_(attribution)
    return difference.square().sum(), negative.sum()


def contestants(gradient, parameter, reference):
    compiled = torch.compile(transcription, dynamic=False)
    code = DTYPE_CODES[gradient.dtype]
    table = [gradient.data_ptr(), parameter.data_ptr(), reference.data_ptr(), 0, gradient.numel(), code, code, code, 0]
    return {
        "C++": lambda: penalty_([gradient], [parameter], [reference], weight=WEIGHT, backend="cpp"),
        "eager": lambda: transcription(gradient, parameter, reference),
        "compiled": lambda: compiled(gradient, parameter, reference),
        "limit": lambda: _C.penalty_traffic(table, torch.get_num_threads()),
    }


def check(dtype):
    """Raise unless the contestants that compute agree, on data of this dtype."""
    generator = torch.Generator().manual_seed(1)
    original = [torch.randn(1_000_003, generator=generator).to(dtype) for _ in range(3)]
    outcomes = {}
    for name in ("eager", "compiled", "C++"):
        buffers = [tensor.clone() for tensor in original]
        penalty, negative, *_ = contestants(*buffers)[name]()
        outcomes[name] = (buffers[0], buffers[2], penalty.double(), negative)
    for name in ("compiled", "C++"):
        for mine, eager in zip(outcomes[name], outcomes["eager"], strict=True):
            tolerance = max(1e-5, torch.finfo(dtype).eps)
            torch.testing.assert_close(mine, eager, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def peak_allocation(call, restore):
    """Bytes by which the resident memory's peak rose over its level before the call."""
    restore()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def measure(dtype, elements, rounds):
    check(dtype)
    generator = torch.Generator().manual_seed(0)
    gradient, parameter, reference = (torch.randn(elements, generator=generator).to(dtype) for _ in range(3))
    kept = gradient.clone(), reference.clone()

    def restore():
        gradient.copy_(kept[0])
        reference.copy_(kept[1])

    calls = contestants(gradient, parameter, reference)
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            restore()
            start = time.perf_counter()
            call()
            # the first turn compiles and warms up
            if turn:
                times[name].append(time.perf_counter() - start)
    traffic = 5 * elements * dtype.itemsize
    case = f"{elements / 1e6:g} M {str(dtype).removeprefix('torch.')}"
    rows = []
    for name, call in calls.items():
        seconds = quantiles(times[name])
        speed = traffic / seconds[1] / 1e9
        rows.append(Row("penalty", case, name, seconds, rounds, speed, peak_allocation(call, restore)))
    return rows


def table(rows):
    by_name = {row.contestant: row for row in rows}
    print(f"\n{rows[0].case}")
    heads = ("median ms", "10-90 %", "GB/s", "% of limit", "x eager", "x compiled", "alloc MB")
    print(f"{'':10}{''.join(f'{head:>12}' for head in heads)}")
    for row in rows:
        low, median, high = (1e3 * second for second in row.seconds)
        print(
            f"{row.contestant:10}{median:12.1f}{f'{low:.0f}-{high:.0f}':>12}{row.gigabytes_per_second:12.2f}"
            f"{100 * by_name['limit'].median / row.median:12.0f}{by_name['eager'].median / row.median:12.2f}"
            f"{by_name['compiled'].median / row.median:12.2f}{row.peak_allocation_bytes / 1e6:12.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{hardware()}, {args.threads} threads, unit {_C.cpu_unit()}; {names}; median of {args.rounds} rounds")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        measured = measure(dtype, args.elements, args.rounds)
        table(measured)
        rows += measured
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
