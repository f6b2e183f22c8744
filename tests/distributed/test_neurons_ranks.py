"""The penalty on neurons in two processes is that of one."""

import neuron_rank_cases
import pytest
from in_ranks import run_cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_cases("neuron_rank_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", neuron_rank_cases.CASES)
def test_case(case, outcomes):
    for rank, outcome in enumerate(outcomes[case]):
        assert not outcome, f"rank {rank}: {outcome}"
