import sys
from pathlib import Path

import pytest
import torch

# tests import their helpers by name, wherever they are run from
sys.path.insert(0, str(Path(__file__).parent))
# small tensors gain nothing from more threads, and lose much where other processes want the cores
torch.set_num_threads(1)


def pytest_configure(config):
    # here, not in pyproject.toml: the tests also run from elsewhere, against an installed wheel
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with -m gpu")
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not gpu"


def pytest_ignore_collect(collection_path, config):
    # a machine with a GPU need not have what the other tests import
    if config.option.markexpr == "gpu" and collection_path.is_file() and collection_path.parent.name != "gpu":
        return True
    return None


@pytest.fixture(scope="session")
def taught_folder(tmp_path_factory):
    """Folder of a model that knows a few invented people."""
    from taught import teach_into

    folder = tmp_path_factory.mktemp("taught") / "model"
    teach_into(folder)
    return folder


@pytest.fixture
def taught(taught_folder):
    """(model, encoder): a fresh copy of it."""
    from taught import load_taught

    return load_taught(taught_folder)
