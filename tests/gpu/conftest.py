import sys
from pathlib import Path

import pytest
import torch

# the cases of penalty_ are shared with the CPU's tests
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


def pytest_runtest_setup(item):
    # asked when a test starts, so that collecting tests doesn't look for a device
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda finds no CUDA device here, or this torch is built without CUDA")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poisoned_memory():
    """What torch.empty returns is NaN, or the largest integer: an element that isn't written fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
