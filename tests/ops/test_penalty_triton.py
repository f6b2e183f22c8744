"""The Triton form of penalty_: interpreted on the CPU, and compiled ahead of time for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssiuu_fast.kernels import penalty, tuning
from ssiuu_fast.kernels.penalty import WARPS, penalty_kernel
from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.ops.blockwise8 import LIMIT


def test_under_the_interpreter():
    # the choice is made when triton is imported, so it takes a process of its own
    tests = Path(__file__).parent / "interpreted" / "penalty_interpreted.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("variant", ["in place", "add, one-sided", "first", "8-bit", "8-bit, first"])
def test_compiles_for(capability, variant, aligned, warps):
    add = variant == "add, one-sided"
    eight_bits = "8-bit" in variant
    changes = {
        "PARAMETER": tl.float32,
        "REFERENCE": tl.uint8 if eight_bits else tl.bfloat16,
        "BLOCKWISE": 256 if eight_bits else 0,
        "OUT": tl.float32 if add else tl.bfloat16,
        "LIMIT": LIMIT if eight_bits else torch.finfo(torch.bfloat16).max,
        "ADD": add,
        "ONE_SIDED": add,
        "FIRST": "first" in variant,
        "ALIGNED": aligned,
    }
    asm = compiled(capability, warps, **changes)
    assert asm["cubin"]
    # a fused multiply-add rounds once where the formula rounds twice
    assert "fma.rn" not in asm["ptx"]
    assert "atom." not in asm["ptx"]
    # subnormals count, and a division is rounded once
    assert "ftz" not in asm["ptx"]
    assert ("div.rn.f32" in asm["ptx"]) == eight_bits
    assert bool(re.search(r"(ld|st)\.global\S*\.v4\.b32", asm["ptx"])) == aligned


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "warps"), [(tl.bfloat16, 4), (tl.float16, 4), (tl.float32, 8)], ids=lambda value: str(value)
)
def test_a_thread_reads_and_writes_16_bytes_at_once_where_memory_is_aligned(capability, dtype, warps):
    dtypes = dict.fromkeys(("GRADIENT", "PARAMETER", "REFERENCE", "OUT"), dtype)
    asm = compiled(capability, warps, **dtypes)["ptx"]
    # three buffers are read, and two of them written, each by one instruction
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", asm)) == 3
    assert len(re.findall(r"st\.global\S*\.v4\.b32", asm)) == 2
    unaligned = compiled(capability, warps, ALIGNED=False, **dtypes)["ptx"]
    assert not re.search(r"(ld|st)\.global\S*\.v[24]", unaligned)


def compiled(capability, warps, **changes):
    signature = {
        "table": "*i64",
        "chunks": "*i64",
        "first_chunk": "i32",
        "chunk_length": "i32",
        "weight": "*fp32",
        "gradient_scale": "fp32",
        "partial_sums": "*fp64",
        "partial_counts": "*i64",
        "code_values": "*fp32",
    }
    constants = {
        "GRADIENT": tl.bfloat16,
        "PARAMETER": tl.bfloat16,
        "REFERENCE": tl.bfloat16,
        "BLOCKWISE": 0,
        "OUT": tl.bfloat16,
        "LIMIT": torch.finfo(torch.bfloat16).max,
        "ADD": False,
        "ONE_SIDED": False,
        "UPDATE": True,
        "FIRST": False,
        "ALIGNED": True,
        "BLOCK": 1024,
    } | changes
    source = ASTSource(penalty_kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": warps}).asm


def test_the_buffers_that_warps_are_chosen_on_live_as_long_as_the_launch():
    dtypes = (torch.bfloat16, torch.float32, Blockwise8, torch.float32)
    for aligned in (False, True):
        launch = penalty._launch_on_scratch(penalty.Kind(*dtypes, aligned), torch.device("cpu"))
    gradient, parameter, reference, out = launch.buffers
    assert [gradient.dtype, parameter.dtype, type(reference), out.dtype] == list(dtypes)
    # the kernel may read them as aligned ones
    assert penalty.kind_of(*launch.buffers).aligned
    assert gradient.nbytes + parameter.nbytes + reference.codes.nbytes + out.nbytes == pytest.approx(2**27, rel=1e-3)


def test_the_choice_is_measured_once_a_key(monkeypatch):
    timed, capturing = [], False
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda launch, warps: launch(warps))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def prepare():
        return lambda warps: timed.append(warps) or 1 / warps

    def fastest(key, device, prepare=prepare):
        return tuning.fastest(key, (4, 8), device, prepare)

    cuda = torch.device("cuda", 0)
    assert fastest("a", torch.device("cpu")) == 4 and not timed
    capturing = True
    assert fastest("a", cuda) == 4 and not timed
    capturing = False
    assert [fastest("a", cuda) for _ in range(2)] == [8, 8]
    assert timed == [4, 8]
    capturing = True
    assert fastest("a", cuda) == 8

    def no_memory():
        raise torch.OutOfMemoryError

    capturing = False
    assert fastest("b", cuda, no_memory) == 4
