"""The CUDA kernels themselves, run thread by thread on the CPU, against the reference."""

import neuron_cases
import penalty_grid
import pytest
import small_grid
import torch
from penalty_cases import Case, every_magnitude

from ssiuu_fast.ops import Blockwise8, neuron_attribution, neuron_penalty, penalty_

pytestmark = pytest.mark.usefixtures("cuda_on_cpu")
CPU = torch.device("cpu")
SINGLE = [torch.float32, torch.bfloat16, torch.float16]


def compare(case, what):
    """The reference's numbers, on the road of 16-byte accesses."""
    mine, theirs = (penalty_grid.placed(case, CPU, penalty_grid.ALIGNED) for _ in range(2))
    result, counts = penalty_grid.run(mine, "cuda", what)
    plain, plain_counts = penalty_grid.run(theirs, "reference", what)
    penalty_grid.assert_same_outcome(mine, theirs, what)
    assert torch.equal(counts, plain_counts), what
    penalty_grid.assert_same_sums(result, plain, what)


@pytest.mark.parametrize("number", range(len(penalty_grid.OPTIONS)))
def test_the_grid_meant_for_a_gpu(number):
    options = penalty_grid.OPTIONS[number]
    for layout in (penalty_grid.ALIGNED, penalty_grid.ODD, penalty_grid.MIXED):
        case = penalty_grid.case_of(penalty_grid.COMBINATIONS, options, number + layout)
        penalty_grid.check(case, CPU, "cuda", layout, f"options {options}, layout {layout}")


def test_random_calls():
    for seed in range(60):
        penalty_grid.check(penalty_grid.random_call(seed), CPU, "cuda", seed % 3, f"case {seed}")
        poisoned = penalty_grid.random_call(seed, poison=True)
        penalty_grid.check_poisoned(poisoned, CPU, "cuda", seed % 3, f"case {seed}")


def test_what_a_memory_checker_watches_on_a_gpu():
    small_grid.main("cpu", "cuda")


def normal_case(dtypes, sizes):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(size, generator=generator).to(dtype) for size in sizes] for dtype in dtypes]
    return Case(*lists, [None] * len(sizes), {"weight": 0.5})


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("gradient", SINGLE)
@pytest.mark.parametrize("parameter", SINGLE)
def test_aligned_tensors_of_several_chunks(gradient, parameter, eight_bits):
    case = normal_case((gradient, parameter, torch.bfloat16), (40_001, 0, 256, 4096, 5, 12_288))
    if eight_bits:
        case.references = [Blockwise8.encode(reference.float()) for reference in case.references]
    case.outs[3] = torch.ones(4096, dtype=gradient)
    case.outs[5] = torch.ones(12_288)
    compare(case, f"{gradient}, {parameter}, {eight_bits}")


def test_codes_of_every_magnitude():
    compare(every_magnitude(), "codes")


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e12])
def test_squares_that_fp32_cannot_hold(scale):
    case = normal_case([torch.float32] * 3, (5000,))
    case.gradients[0] *= scale
    case.references[0] *= scale
    compare(case, f"{scale}")


def test_three_thousand_small_tensors():
    sizes = [1 + 7 * i % 40 for i in range(3000)]
    compare(normal_case((torch.bfloat16, torch.float32, torch.bfloat16), sizes), "3,000")


def test_nothing_is_written_past_the_ends():
    for size in (1, 7, 255, 257, 4097):
        buffers = [torch.full((size + 64,), 7.0) for _ in range(3)]
        inner = [buffer[32 : 32 + size] for buffer in buffers]
        penalty_(*([tensor] for tensor in inner), weight=0.5, backend="cuda")
        for buffer in buffers:
            assert (buffer[:32] == 7).all() and (buffer[32 + size :] == 7).all()


def test_weight_from_the_device():
    tensors = [torch.tensor([value]) for value in (-1.0, 2.0, -1.0)]
    penalty_(*([t] for t in tensors), weight=torch.tensor([0.5]), backend="cuda")
    # A = −2, d = −1
    assert [t.item() for t in tensors] == [1.0, 2.0, -2.0]


def test_only_empty_tensors():
    empty = [torch.empty(0) for _ in range(3)]
    assert [x.item() for x in penalty_(*([t] for t in empty), weight=1.0, backend="cuda")] == [0, 0, 0, 0]


SHAPES = [*neuron_cases.SHAPES, (2, 40, 264), (1, 1100, 16), (1, 1027, 5)]


def test_neuron_attribution_equals_the_reference():
    for name, case in neuron_cases.cases(SINGLE, SHAPES, every=5):
        arguments = (case.hidden, case.gradient, case.mask)
        kernel, plain = (neuron_attribution(*arguments, backend=backend) for backend in ("cuda", "reference"))
        assert torch.equal(kernel.max, plain.max) and torch.equal(kernel.min, plain.min), name
        torch.testing.assert_close(kernel.sum, plain.sum, rtol=1e-6, atol=1e-5, msg=name)


def test_a_counted_nan_shows_and_a_masked_one_does_not():
    hidden, gradient = torch.randn(2, 2, 70, 24, generator=torch.Generator().manual_seed(0))
    hidden[0, 3, 2] = hidden[1, 5, 7] = torch.nan
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, 5] = False
    result = neuron_attribution(hidden, gradient, mask, backend="cuda")
    for values in result:
        assert values.isnan().nonzero().tolist() == [[0, 2]]


def test_neuron_penalty_equals_the_reference():
    for name, case in neuron_cases.cases(SINGLE, SHAPES, every=5):
        kernel, plain = case.run("cuda"), case.run("reference")
        scale = plain.attribution.abs().max().item() if plain.attribution.numel() else 0
        torch.testing.assert_close(kernel.attribution, plain.attribution, rtol=1e-6, atol=1e-6 * scale, msg=name)
        unit = torch.finfo(kernel.injection.dtype).eps
        injected = plain.injection.abs().max().item() if plain.injection.numel() else 0
        torch.testing.assert_close(
            kernel.injection, plain.injection, rtol=2 * unit + 1e-5, atol=1e-5 * injected, msg=name
        )
        torch.testing.assert_close(kernel.penalty, plain.penalty, rtol=1e-5, atol=1e-5 * scale**2, msg=name)
        assert kernel.negative == plain.negative, name


def test_neuron_penalty_by_hand():
    hidden, gradient = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[[-1.0, 1], [-1, 1]]])
    reference = torch.tensor([-1.0, 0])
    result = neuron_penalty(hidden, gradient, reference, weight=torch.tensor(0.5), per_sample=False, backend="cuda")
    # A = (−1 − 3, 2 + 4) = (−4, 6), d = (−3, 0), injection = 2 · ½ · d · g
    assert result.attribution.tolist() == [-4, 6]
    assert gradient.tolist() == [[[3, 0], [3, 0]]]
    assert (result.penalty.item(), result.negative.item()) == (9, 1)


def test_an_unknown_reference_is_left_out():
    hidden, gradient = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[[-1.0, -1], [-1, -1]]])
    reference = torch.tensor([torch.nan, -5])
    result = neuron_penalty(hidden, gradient, reference, weight=0.5, per_sample=False, backend="cuda")
    # A = (−4, −6), and the first has nothing to be compared with
    assert result.attribution.tolist() == [-4, -6]
    assert gradient.tolist() == [[[0, 1], [0, 1]]]
    assert (result.penalty.item(), result.negative.item()) == (1, 1)
