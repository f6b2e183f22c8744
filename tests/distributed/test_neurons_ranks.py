"""The penalty on neurons in two processes is that of one."""

import pytest
from neuron_rank_cases import CASES


def run_case(rank, name):
    CASES[name](rank)


@pytest.mark.parametrize("name", CASES)
def test_case(two_ranks, name):
    two_ranks(run_case, name)
