"""The Triton form of penalty_: interpreted on the CPU, and compiled ahead of time for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from ssiuu_fast.kernels import tuning
from ssiuu_fast.kernels.penalty import WARPS
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
@pytest.mark.parametrize("variant", ["in place", "add, one-sided", "first", "8-bit", "8-bit, first"])
def test_compiles_for(capability, variant, warps):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssiuu_fast.kernels.penalty import penalty_kernel

    add = variant == "add, one-sided"
    eight_bits = "8-bit" in variant
    signature = {
        "table": "*i64",
        "chunk_tensor": "*i64",
        "chunk_begin": "*i64",
        "chunk_length": "i32",
        "weight": "*fp32",
        "gradient_scale": "fp32",
        "partial_sums": "*fp64",
        "partial_counts": "*i64",
        "code_values": "*fp32",
    }
    constants = {
        "GRADIENT": tl.bfloat16,
        "PARAMETER": tl.float32,
        "REFERENCE": tl.uint8 if eight_bits else tl.bfloat16,
        "BLOCKWISE": 256 if eight_bits else 0,
        "OUT": tl.float32 if add else tl.bfloat16,
        "LIMIT": LIMIT if eight_bits else torch.finfo(torch.bfloat16).max,
        "ADD": add,
        "ONE_SIDED": add,
        "UPDATE": True,
        "FIRST": "first" in variant,
        "BLOCK": 1024,
    }
    source = ASTSource(penalty_kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": warps})
    assert compiled.asm["cubin"]
    # a fused multiply-add rounds once where the formula rounds twice
    assert "fma.rn" not in compiled.asm["ptx"]
    assert "atom." not in compiled.asm["ptx"]
    # subnormals count, and a division is rounded once
    assert "ftz" not in compiled.asm["ptx"]
    assert ("div.rn.f32" in compiled.asm["ptx"]) == eight_bits


def test_the_buffers_that_warps_are_chosen_on_live_as_long_as_the_launch():
    from ssiuu_fast.kernels import penalty

    dtypes = (torch.bfloat16, torch.float32, Blockwise8, torch.float32)
    launch = penalty._launch_on_scratch(dtypes, torch.device("cpu"))
    ((gradient, parameter, reference, out),) = launch.buffers
    assert [gradient.dtype, parameter.dtype, type(reference), out.dtype] == list(dtypes)
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
