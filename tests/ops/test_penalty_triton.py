"""The Triton form of penalty_: interpreted on the CPU, and compiled ahead of time for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton


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


CONSTANTS = ("GRADIENT", "PARAMETER", "REFERENCE", "OUT", "LIMIT", "ADD", "ONE_SIDED", "UPDATE", "FIRST", "BLOCK")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", ["in place", "add, one-sided", "first"])
def test_compiles_for(capability, variant):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssiuu_fast.kernels.penalty import penalty_kernel

    add = variant == "add, one-sided"
    signature = {
        "table": "*i64",
        "chunk_tensor": "*i64",
        "chunk_begin": "*i64",
        "chunk_length": "i32",
        "weight": "*fp32",
        "gradient_scale": "fp32",
        "partial_sums": "*fp64",
        "partial_counts": "*i64",
    }
    constants = {
        "GRADIENT": tl.bfloat16,
        "PARAMETER": tl.float32,
        "REFERENCE": tl.bfloat16,
        "OUT": tl.float32 if add else tl.bfloat16,
        "LIMIT": torch.finfo(torch.bfloat16).max,
        "ADD": add,
        "ONE_SIDED": add,
        "UPDATE": True,
        "FIRST": variant == "first",
        "BLOCK": 1024,
    }
    source = ASTSource(penalty_kernel, signature | dict.fromkeys(CONSTANTS, "constexpr"), constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"]
    # a fused multiply-add rounds once where the formula rounds twice
    assert "fma.rn" not in compiled.asm["ptx"]
    assert "atom." not in compiled.asm["ptx"]
