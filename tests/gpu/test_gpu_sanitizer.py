"""The CUDA kernels under compute-sanitizer: no access outside their memory, no race, no barrier that threads miss."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("small_grid.py")
# calls that torch makes to look what a driver offers fail on some, and are no error of ours
CHECKS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}
SECONDS = 240


def watched(command, file, seconds, environment=None):
    """Exit status of a command, and what it and those that it started printed; None where it took too long.

    They print to a file: a pipe would have to be read until the last of them ends.
    """
    with file.open("w") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = started.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    return status, file.read_text(errors="replace")


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_found(check, tmp_path):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
    command = [tool, "--tool", check, *CHECKS[check], "--error-exitcode", "9", sys.executable, str(SCRIPT)]
    # each tensor in an allocation of its own, so that a step outside one is seen; what is printed isn't held back
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    status, said = watched(command, tmp_path / "said.txt", SECONDS, environment)
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert status is not None, f"{check} had not ended after {SECONDS} s, and had printed:\n{said[-6000:]}"
    assert status == 0, said[-6000:]
