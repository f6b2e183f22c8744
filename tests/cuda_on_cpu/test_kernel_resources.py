"""Every kernel compiles with nvcc, and none spills registers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc isn't on PATH")
def test_kernels_compile_and_spill_nothing():
    done = subprocess.run([sys.executable, str(SCRIPT), "--architectures", "90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("penalty_kernel", "reduce_kernel<true, bfloat16>", "injection_kernel<true>"):
        assert name in done.stdout


def test_a_spill_is_reported():
    sys.path.insert(0, str(SCRIPT.parent))
    import kernel_resources

    report = """ptxas info    : Compiling entry function '_Z4sumsPf' for 'sm_90'
ptxas info    : Function properties for _Z4sumsPf
    64 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 1728 bytes smem
"""
    (kernel,) = kernel_resources.parse(report, "sums.cu", 90)
    assert kernel[2:] == (90, 80, 32, 1728)
    # 80 registers · 32 lanes · 8 warps a block: three blocks
    assert kernel.warps == 24
