"""penalty_ in C++ on thousands of random calls: error against fp64, and the same bits however it is run."""

import pytest
import torch
from penalty_cases import Case, expected, random_case

from ssiuu_fast import _C
from ssiuu_fast.ops import penalty_

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def restore():
    yield
    torch.set_num_threads(THREADS)
    _C.use_cpu_unit(_C.cpu_units()[-1])


def written(case):
    return [gradient if out is None else out for gradient, out in zip(case.gradients, case.outs, strict=True)]


def assert_three_way(kernel, transcribed, truth, what, seed):
    """The kernel's largest error is at most torch's, but for the one rounding to the dtype of storage."""
    if not kernel.numel():
        return
    error = (kernel.double() - truth).abs()
    worst = error.argmax()
    rounding = torch.finfo(kernel.dtype).eps * truth.abs().max() + torch.finfo(kernel.dtype).tiny
    bound = (transcribed.double() - truth).abs().max() + rounding
    assert error[worst] <= bound, (
        f"{what} of case {seed}, worst at {worst.item()}: {kernel[worst].item()} for {truth[worst].item()},"
        f" error {error[worst].item():.3e} > {bound.item():.3e}"
    )


def check_case(seed):
    case = random_case(torch.Generator().manual_seed(seed), double=seed % 8 == 7)
    truths = list(expected(case, torch.float64))
    transcriptions = list(expected(case))
    mine = case.copy()
    result = mine.run(penalty_, "cpp")
    for i, (truth, transcription) in enumerate(zip(truths, transcriptions, strict=True)):
        assert_three_way(written(mine)[i], transcription.value, truth.value, f"value[{i}]", seed)
        assert_three_way(mine.references[i], transcription.reference, truth.reference, f"reference[{i}]", seed)
        if case.outs[i] is not None:
            assert torch.equal(mine.gradients[i], case.gradients[i])
        assert torch.equal(mine.parameters[i], case.parameters[i])
    check_sums(result, truths, seed)


def check_sums(result, truths, seed):
    """Each difference carries the rounding of A in fp32, a few 2^-24 of what it cancelled from."""
    assert result.negative.item() == sum(truth.negative.item() for truth in truths)
    assert result.nonfinite.item() == 0
    penalty = sum(truth.penalty.item() for truth in truths)
    cancelled = sum(truth.cancelled.item() for truth in truths)
    # |Σ(d+e)² − Σd²| <= 2·√Σd²·√Σe² + Σe²
    rounding = 4e-7 * (penalty * cancelled) ** 0.5 + 1e-13 * cancelled
    assert result.penalty.item() == pytest.approx(penalty, rel=1e-6, abs=rounding), f"penalty of case {seed}"
    square = sum(truth.gradient_square.item() for truth in truths)
    steepest = max(truth.largest_gradient.item() for truth in truths)
    rounding = steepest * (4e-7 * (square * cancelled) ** 0.5 + steepest * 1e-13 * cancelled)
    assert result.gradient_square.item() == pytest.approx(square, rel=1e-6, abs=rounding), (
        f"gradient_square of case {seed}"
    )


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
            runs.append((written(run) + run.references + [counts], result))
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
    tensors = written(run) + run.references + list(result)
    return [t.reshape(-1).view(torch.uint8) for t in tensors]


def test_same_bits_for_any_number_of_threads_and_any_unit():
    sizes = (1_000_003, 300_007, 17, 65_536)
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        case = random_case(generator)
        for tensors in (case.gradients, case.parameters, case.references):
            tensors[:] = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
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
