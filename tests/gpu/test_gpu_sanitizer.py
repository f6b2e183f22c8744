"""The CUDA kernels under compute-sanitizer: no access outside their memory, no race between their threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("small_grid.py")
# calls that torch makes to look what a driver offers fail on some, and are no error of ours
CHECKS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_found(check):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
    run = subprocess.run(
        [tool, "--tool", check, *CHECKS[check], "--error-exitcode", "9", sys.executable, str(SCRIPT)],
        # each tensor in an allocation of its own, so that a step outside one is seen
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = run.stdout + run.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, said[-6000:]
