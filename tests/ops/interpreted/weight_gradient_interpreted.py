"""The Triton kernel of weight gradients under Triton's interpreter; run by test_weight_gradient_triton.py in a process
of its own.

The interpreter truncates fp32 to bf16 instead of rounding: one unit in the last place is allowed there.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from weight_gradient_cases import (  # noqa: E402
    OPTIONS,
    SHAPES,
    SINGLE,
    check_both,
    check_penalized,
    check_penalized_exact,
    check_weighted,
    make_case,
)

from ssiuu_fast.kernels import weight_gradient  # noqa: E402
from ssiuu_fast.ops import Blockwise8, both_weight_gradients, penalized_weight_gradient  # noqa: E402
from ssiuu_fast.ops import weighted_weight_gradient as weighted  # noqa: E402

# the last one is of whole vectors of 16 bytes, and of more than a tile
ALL = (*SHAPES, ((2, 33), 144, 80))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty returns is NaN, or the largest integer: an element that isn't written fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cases(seed, **options):
    """(name, case, number): every shape once, dtypes, layouts and rows in turn."""
    for place, shape in enumerate(ALL):
        number = place + 7 * seed
        # contiguous where it is to be read 16 bytes at once
        layout = 0 if shape == ALL[-1] else number
        dtype = SINGLE[(place + seed) % 3]
        generator = torch.Generator().manual_seed(number)
        yield f"{shape} {dtype}, case {number}", make_case(shape, dtype, layout, generator, **options), number


@pytest.mark.parametrize("seed", range(3))
def test_weighted(seed):
    for name, case, number in cases(seed):
        check_weighted(name, case, number, "triton")


@pytest.mark.parametrize("seed", range(2))
def test_both(seed):
    for name, case, number in cases(seed):
        check_both(name, case, number, "triton")


def test_penalized():
    for name, case, number in cases(2):
        check_penalized(name, case, number, "triton")


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_penalized_whole_numbers_are_the_references(poisoned):
    for name, case, number in list(cases(int(poisoned), whole=True))[int(poisoned) :: 2]:
        options = [OPTIONS[number % 6]]
        check_penalized_exact(name, case, number, "triton", poisoned=poisoned, ulps=1, options=options)


def test_every_option_of_the_penalty():
    shape = ((3, 5), 5, 7)
    case = make_case(shape, torch.float32, 0, torch.Generator().manual_seed(0), whole=True)
    check_penalized_exact("all options", case, 0, "triton", options=OPTIONS)


def test_tiles_depend_on_memory_not_on_results():
    generator = torch.Generator().manual_seed(0)
    case = make_case(((2, 20), 32, 48), torch.bfloat16, 0, generator)
    moved = [torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape) for tensor in case[:3]]
    chosen, tile_of = [], weight_gradient.tile_of
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_gradient, "tile_of", lambda *about: chosen.append(about[1]) or tile_of(*about))
        for given in (case[:3], moved):
            results.append(both_weight_gradients(*given, backend="triton"))
    assert chosen == [True, False]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("group", [2, 3])
def test_more_rows_of_tiles_than_a_group(monkeypatch, group):
    monkeypatch.setattr(weight_gradient, "_GROUP", group)
    case = make_case(((1, 3), 200, 70), torch.float32, 0, torch.Generator().manual_seed(0))
    check_weighted(f"groups of {group}", case, 0, "triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_sample_without_weight_may_hold_anything():
    case = make_case(((3, 5), 5, 7), torch.float32, 0, torch.Generator().manual_seed(0))
    case.weights[1] = 0
    expected = weighted(*case[:3], backend="reference")
    case.gradient[1] = torch.nan
    case.input[1] = torch.inf
    torch.testing.assert_close(weighted(*case[:3], backend="triton"), expected)


def test_weights_and_the_penaltys_weight_may_be_strided_and_on_the_device():
    case = make_case(((3, 5), 5, 7), torch.float32, 0, torch.Generator().manual_seed(0))
    weights = torch.stack([case.weights, torch.full_like(case.weights, torch.nan)], 1)[:, 0]
    state = torch.randn(2, 5, 7)
    number, tensor = (
        penalized_weight_gradient(
            case.gradient, case.input, given, state[0], state[1].clone(), weight=weight, backend="triton"
        )
        for given, weight in ((case.weights, 0.37), (weights, torch.tensor([0.37])))
    )
    assert all(torch.equal(one, other) for one, other in zip(number, tensor, strict=True))


def test_what_it_has_no_form_for():
    gradient, input = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(RuntimeError, match="computes in float32, these tensors are float64"):
        weighted(gradient.double(), input.double(), torch.ones(2).double(), backend="triton")
    reference = Blockwise8.empty_like(torch.zeros(4, 5))
    with pytest.raises(RuntimeError, match="no form for references of 8 bits"):
        penalized_weight_gradient(
            gradient, input, torch.ones(2), torch.ones(4, 5), reference, weight=1.0, first=True, backend="triton"
        )
