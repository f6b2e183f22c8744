"""How fast is penalty_ on the CPU, against plain torch, torch.compile, and the limit of this machine's memory?

    python benchmarks/penalty.py [--elements 100000000] [--rounds 9] [--threads 2] [--json rows.json]

All buffers in fp32, in bf16, and in fp32 with references in 8 bits. The limit is a C++ loop over the same buffers,
chunks and threads that reads three and rewrites two with one exclusive or each. Contestants take turns round by round
in one process, and buffers are restored before every call, outside the clock. GB/s counts the five passes over memory
that the operator needs, for every contestant alike.
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
from ssiuu_fast.ops import Blockwise8, penalty_
from ssiuu_fast.ops.blockwise8 import tensors_of
from ssiuu_fast.ops.checks import BLOCKWISE8_CODE, DTYPE_CODES

WEIGHT = 0.1


CASES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32, 8-bit references": (torch.float32, Blockwise8),
}


def transcription(gradient, parameter, *reference):
    """Algorithm 1 as one would write it down, in fp32 as the operator computes; two tensors are an 8-bit reference."""
    reference = Blockwise8(*reference) if len(reference) == 2 else reference[0]
    eight_bits = isinstance(reference, Blockwise8)
    g = gradient.float()
    attribution = parameter.float() * g
    negative = attribution < 0
    before = reference.decode() if eight_bits else reference.float()
    difference = torch.where(negative, attribution - before, 0)
    gradient.copy_(WEIGHT * 2 * difference * g)
    reference.store(attribution) if eight_bits else reference.copy_(attribution)
    return difference.square().sum(), negative.sum()


def contestants(gradient, parameter, reference):
    compiled = torch.compile(transcription, dynamic=False)
    code, stored = DTYPE_CODES[gradient.dtype], tensors_of(reference)
    reference_code = BLOCKWISE8_CODE if len(stored) == 2 else code
    table = [gradient.data_ptr(), parameter.data_ptr(), stored[0].data_ptr(), 0, gradient.numel()]
    table += [code, code, reference_code, 0, stored[-1].data_ptr()]
    return {
        "C++": lambda: penalty_([gradient], [parameter], [reference], weight=WEIGHT, backend="cpp"),
        "eager": lambda: transcription(gradient, parameter, *stored),
        "compiled": lambda: compiled(gradient, parameter, *stored),
        "limit": lambda: _C.penalty_traffic(table, torch.get_num_threads()),
    }


def buffers_of(elements, dtype, state, seed):
    generator = torch.Generator().manual_seed(seed)
    gradient, parameter, reference = (torch.randn(elements, generator=generator).to(dtype) for _ in range(3))
    return gradient, parameter, Blockwise8.encode(reference) if state is Blockwise8 else reference


def check(dtype, state):
    """Raise unless the contestants that compute agree, on data of these dtypes."""
    # torch.compile (2.13, CPU) decodes a last block of fewer than 256 elements wrongly
    elements = 1_000_192 if state is Blockwise8 else 1_000_003
    outcomes = {}
    for name in ("eager", "compiled", "C++"):
        gradient, parameter, reference = buffers_of(elements, dtype, state, seed=1)
        penalty, negative, *_ = contestants(gradient, parameter, reference)[name]()
        stored = reference.decode() if state is Blockwise8 else reference
        outcomes[name] = (gradient, stored, penalty.double(), negative)
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


def measure(name, elements, rounds):
    dtype, state = CASES[name]
    check(dtype, state)
    gradient, parameter, reference = buffers_of(elements, dtype, state, seed=0)
    written = (gradient, *tensors_of(reference))
    kept = [tensor.clone() for tensor in written]

    def restore():
        for tensor, values in zip(written, kept, strict=True):
            tensor.copy_(values)

    calls = contestants(gradient, parameter, reference)
    times = {contestant: [] for contestant in calls}
    for turn in range(rounds + 1):
        for contestant, call in calls.items():
            restore()
            start = time.perf_counter()
            call()
            # the first turn compiles and warms up
            if turn:
                times[contestant].append(time.perf_counter() - start)
    traffic = 3 * gradient.nbytes + 2 * sum(tensor.nbytes for tensor in tensors_of(reference))
    case = f"{elements / 1e6:g} M {name}"
    rows = []
    for contestant, call in calls.items():
        seconds = quantiles(times[contestant])
        speed = traffic / seconds[1] / 1e9
        rows.append(Row("penalty", case, contestant, seconds, rounds, speed, peak_allocation(call, restore)))
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
    for name in CASES:
        measured = measure(name, args.elements, args.rounds)
        table(measured)
        rows += measured
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
