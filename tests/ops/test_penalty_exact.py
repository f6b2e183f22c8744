"""penalty_ in C++ on thousands of random calls: error against fp64, and the same bits however it is run."""

import pytest
import torch
from penalty_cases import Case, expected, random_case
from three_way import assert_three_way, check_sums

from ssiuu_fast import _C
from ssiuu_fast.ops import Blockwise8, penalty_
from ssiuu_fast.ops.blockwise8 import VALUES

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def restore():
    yield
    torch.set_num_threads(THREADS)
    _C.use_cpu_unit(_C.cpu_units()[-1])


def check_case(seed):
    case = random_case(torch.Generator().manual_seed(seed), double=seed % 8 == 7)
    truths = list(expected(case, torch.float64))
    transcriptions = list(expected(case))
    mine = case.copy()
    result = mine.run(penalty_, "cpp")
    for i, (truth, transcription) in enumerate(zip(truths, transcriptions, strict=True)):
        assert_three_way(mine.written[i], transcription.value, truth.value, f"value[{i}] of case {seed}")
        if isinstance(mine.references[i], Blockwise8):
            check_eight_bits(mine.references[i], case.references[i], truth.reference, case.options, seed)
        else:
            what = f"reference[{i}] of case {seed}"
            assert_three_way(mine.references[i], transcription.reference, truth.reference, what)
        if case.outs[i] is not None:
            assert torch.equal(mine.gradients[i], case.gradients[i])
        assert torch.equal(mine.parameters[i], case.parameters[i])
    check_sums(result, truths, f"case {seed}")


def check_eight_bits(reference, before, truth, options, seed):
    """The nearest values that the map has, but for the rounding of A in fp32."""
    if not options["update_references"]:
        assert torch.equal(reference.codes, before.codes) and torch.equal(reference.absmax, before.absmax)
        return
    for i, absmax in enumerate(reference.absmax.double()):
        codes, block = (elements[256 * i : 256 * (i + 1)] for elements in (reference.codes, truth))
        torch.testing.assert_close(absmax, block.abs().max(), rtol=1e-6, atol=0, msg=f"absmax of case {seed}")
        values = VALUES.double() * absmax
        ordered = values.sort().values
        above = torch.searchsorted(ordered, block).clamp(1, 255)
        nearest = torch.minimum((ordered[above] - block).abs(), (ordered[above - 1] - block).abs())
        error = (values[codes.int()] - block).abs()
        assert (error <= nearest + 1e-6 * block.abs()).all(), f"codes of case {seed}"


def test_random_cases_against_fp64():
    for seed in range(3000):
        check_case(seed)


@pytest.mark.slow
def test_ten_times_as_many_random_cases_against_fp64():
    for seed in range(3000, 33_000):
        check_case(seed)


def test_random_cases_with_nonfinite_elements_equal_the_reference():
    for seed in range(500):
        case = random_case(torch.Generator().manual_seed(seed), double=seed % 8 == 7, poison=True)
        runs = []
        for backend in ("reference", "cpp"):
            run, counts = case.copy(), torch.full((len(case.gradients),), -1)
            result = run.run(penalty_, backend, nonfinite_counts=counts)
            runs.append((run.written + [counts], result))
        for reference, kernel in zip(runs[0][0], runs[1][0], strict=True):
            torch.testing.assert_close(kernel, reference, rtol=0, atol=0, equal_nan=True, msg=f"case {seed}")
        for reference, kernel in zip(runs[0][1], runs[1][1], strict=True):
            # blocks of squares are summed in fp32 where that is safe
            torch.testing.assert_close(kernel, reference, rtol=5e-7, atol=0, msg=f"case {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", _C.cpu_units())
def test_sums_of_any_size_beside_each_other(dtype, unit):
    _C.use_cpu_unit(unit)
    generator = torch.Generator().manual_seed(0)
    size = 5003
    parameter, reference = torch.randn(size, generator=generator).to(dtype), torch.zeros(size, dtype=dtype)
    for low, high in ((-30, -28), (-25, 15), (-20, -10), (-3, 3), (0, 18), (17, 18)):
        exponents = low + (high - low) * torch.rand(size, generator=generator)
        gradient = (torch.randn(size, generator=generator) * 10**exponents).to(dtype)
        case = Case([gradient], [parameter], [reference], [None], {"weight": 1.0})
        plain, kernel = (case.copy().run(penalty_, backend) for backend in ("reference", "cpp"))
        for name in ("penalty", "gradient_square"):
            mine, expected_sum = getattr(kernel, name).item(), getattr(plain, name).item()
            assert mine == pytest.approx(expected_sum, rel=5e-7, abs=0) and mine > 0, (name, low, high)


def bits(case, threads, unit):
    torch.set_num_threads(threads)
    _C.use_cpu_unit(unit)
    run = case.copy()
    result = run.run(penalty_, "cpp")
    tensors = run.written + list(result)
    return [t.reshape(-1).view(torch.uint8) for t in tensors]


def test_same_bits_for_any_number_of_threads_and_any_unit():
    sizes = (1_000_003, 300_007, 17, 65_536)
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, Blockwise8):
        case = random_case(generator)
        for tensors in (case.gradients, case.parameters, case.references):
            number = torch.float32 if dtype is Blockwise8 else dtype
            tensors[:] = [torch.randn(size, generator=generator).to(number) for size in sizes]
        if dtype is Blockwise8:
            case.references = [Blockwise8.encode(reference) for reference in case.references]
        case.outs = [None] * len(sizes)
        for first in (False, True):
            case.options |= {"first": first, "update_references": True}
            one = bits(case, 1, "baseline")
            for unit in _C.cpu_units():
                for threads in (1, 2, 5):
                    other = bits(case, threads, unit)
                    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (dtype, unit, threads)


def test_same_bits_from_every_unit_on_random_cases():
    for seed in range(400):
        case = random_case(torch.Generator().manual_seed(seed))
        one, *others = [bits(case, 2, unit) for unit in _C.cpu_units()]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), f"case {seed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", _C.cpu_units())
def test_every_16_bit_value_is_read_and_written_exactly(dtype, unit):
    _C.use_cpu_unit(unit)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    # A = φ · 1 is stored: the same number again
    reference = torch.zeros_like(every)
    penalty_([torch.ones_like(every)], [every], [reference], weight=1.0, first=True, backend="cpp")
    finite = every.isfinite()
    assert torch.equal(reference[finite].view(torch.int16), every[finite].view(torch.int16))
    assert (reference[~finite] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", _C.cpu_units())
def test_rounding_to_16_bits_is_to_nearest_even(dtype, unit):
    _C.use_cpu_unit(unit)
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    halfway = (every[1:].double() + every[:-1].double()).div(2).float()
    numbers = torch.cat([halfway, torch.nextafter(halfway, every[1:]), torch.nextafter(halfway, every[:-1])])
    numbers = torch.cat([numbers, -numbers])
    reference = torch.zeros(len(numbers), dtype=dtype)
    penalty_([torch.ones_like(numbers)], [numbers], [reference], weight=1.0, first=True, backend="cpp")
    assert torch.equal(reference.view(torch.int16), numbers.to(dtype).view(torch.int16))
