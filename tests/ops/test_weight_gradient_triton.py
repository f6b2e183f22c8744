"""The Triton kernel of weight gradients: interpreted, and compiled ahead of time for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from weight_gradient_resources import compile_form  # noqa: E402


def test_under_the_interpreter():
    # the choice is made when triton is imported, so it takes a process of its own
    tests = Path(__file__).parent / "interpreted" / "weight_gradient_interpreted.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("form", "dtype", "aligned", "wide", "architecture"),
    [
        ("weighted", torch.float16, True, False, 80),
        ("both", torch.bfloat16, True, True, 90),
        ("penalty", torch.bfloat16, True, True, 90),
        ("penalty", torch.bfloat16, False, False, 80),
        ("penalty", torch.float32, False, False, 90),
    ],
    ids=str,
)
def test_compiles_for(form, dtype, aligned, wide, architecture):
    """The forms that ask most of each; benchmarks/weight_gradient_resources.py compiles all of them."""
    compiled = compile_form(form, dtype, aligned, architecture, wide)
    assert compiled.kernel.spilled_bytes == 0
    # what a block may have on any of these devices
    assert compiled.shared_bytes <= 99 * 1024
    ptx = compiled.ptx
    # subnormals count, every sum has a place of its own, and float32 is multiplied as such
    assert "ftz" not in ptx and "tf32" not in ptx and not re.search(r"\b(atom|red)\.", ptx)
    if dtype != torch.float32:
        # a fused multiply-add rounds once where the formula rounds twice
        assert "fma.rn.f32" not in ptx
        # one matrix product for both gradients: 64 or 32 tokens are 16 at a time of 64 outputs, or of 16 by 8
        tiles = {90: 4, 80: 16 if aligned else 8}[architecture]
        assert len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)) == tiles
    # tokens are on their way to shared memory, 16 bytes a thread, while those before them are multiplied
    assert not aligned or "cp.async.cg.shared.global" in ptx
