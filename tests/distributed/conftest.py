import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Runs a function on two gloo ranks (two_ranks.py)."""
    from two_ranks import TwoRanks

    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()
