"""The operators on weight gradients on a GPU, over shapes, layouts, dtypes, chosen samples and values that are none."""

import pytest
import torch
from weight_gradient_cases import (
    OPTIONS,
    SHAPES,
    SINGLE,
    check_both,
    check_penalized,
    check_penalized_exact,
    check_weighted,
    make_case,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
# many tiles, one short of a tile, one token a sample, tokens past a whole number of steps; vectors of 16 bytes and none
LARGE = (((3, 129), 272, 400), ((5, 1), 128, 128), ((4, 257), 131, 255), ((2, 64), 1040, 96), ((1, 4099), 257, 64))


def cases(device, shapes, seeds, **options):
    """(name, case, number): each shape in each dtype, layouts and rows in turn."""
    for seed in range(seeds):
        for place, shape in enumerate(shapes):
            for kind, dtype in enumerate(SINGLE):
                number = place + 7 * seed + 3 * kind
                # every other time contiguous, all samples
                layout = number if (seed + place) % 2 else 0
                generator = torch.Generator().manual_seed(number)
                case = make_case(shape, dtype, layout, generator, **options).to(device)
                yield f"{shape} {dtype}, case {number}", case, number


@pytest.mark.parametrize("backend", ["library", "triton"])
@pytest.mark.parametrize("check", [check_weighted, check_both, check_penalized])
def test_small(device, backend, check):
    for name, case, number in cases(device, SHAPES, 3):
        check(name, case, number, backend)


@pytest.mark.parametrize("check", [check_weighted, check_both, check_penalized])
def test_large(device, check):
    for name, case, number in cases(device, LARGE, 2):
        check(name, case, number, "triton")


@pytest.mark.parametrize("poisoned", [False, True])
def test_whole_numbers_are_the_references(device, poisoned):
    for name, case, number in cases(device, (*SHAPES, *LARGE[:4]), 1, whole=True):
        options = [OPTIONS[number % 6], OPTIONS[(number + 3) % 6]]
        # sums of float64 in another order, some of more than 2^53
        check_penalized_exact(name, case, number, "triton", poisoned=poisoned, sums=1e-14, options=options)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_indices_of_samples_may_lie_on_either(device, kind):
    case = make_case(((9, 20), 48, 80), torch.bfloat16, 3, torch.Generator().manual_seed(0)).to(device)
    assert isinstance(case.rows, torch.Tensor)
    case = case._replace(rows=case.rows.to(device if kind == "device" else "cpu"))
    torch.cuda.synchronize()
    for number, backend in enumerate(("library", "triton")):
        check_weighted(kind, case, number, backend)
