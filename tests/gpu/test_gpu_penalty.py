"""penalty_ on a GPU: every combination of dtypes and options, and random calls, against fp64 and the reference."""

import pytest
import torch
from penalty_cases import LARGE
from penalty_grid import (
    ALIGNED,
    COMBINATIONS,
    MIXED,
    ODD,
    OPTIONS,
    assert_same_outcome,
    assert_same_sums,
    case_of,
    check,
    check_poisoned,
    covered_call,
    covering,
    placed,
    random_call,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
# Triton compiles a kernel for each combination of dtypes and options, up to a second each: it gets few of them, in
# which every two dtypes meet
CALLS = {"cuda": random_call, "triton": covered_call}
RANDOM_CASES = {"cuda": 1000, "triton": 200}


@pytest.mark.parametrize("layout", [ALIGNED, ODD, MIXED], ids=["aligned", "odd", "mixed"])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_every_dtype_with_every_option_in_cuda(device, number, layout):
    for seed in range(3):
        case = case_of(COMBINATIONS, OPTIONS[number], seed)
        check(case, device, "cuda", layout, f"options {OPTIONS[number]}, seed {seed}")


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_every_two_dtypes_and_every_option_in_triton(device, number):
    for seed, layout in enumerate((ALIGNED, ODD, MIXED)):
        case = case_of(covering(number), OPTIONS[number], seed)
        check(case, device, "triton", layout, f"options {OPTIONS[number]}, seed {seed}")
    # as multiples of 16 all are read 16 bytes a thread
    case = case_of(covering(number), OPTIONS[number], 3, sizes=(16, 256, 4112, 33_008))
    check(case, device, "triton", ALIGNED, f"options {OPTIONS[number]}, whole vectors")


@BACKENDS
def test_random_cases(device, backend):
    for seed in range(RANDOM_CASES[backend]):
        check(CALLS[backend](seed), device, backend, seed % 3, f"case {seed}")


@BACKENDS
def test_random_cases_with_nonfinite_elements_equal_the_reference(device, backend):
    for seed in range(RANDOM_CASES[backend] // 4):
        check_poisoned(CALLS[backend](seed, poison=True), device, backend, seed % 3, f"poisoned case {seed}")


@pytest.mark.parametrize("poison", [False, True])
def test_cuda_and_triton_agree_bit_for_bit(device, poison):
    for seed in range(RANDOM_CASES["triton"]):
        case = covered_call(seed, poison=poison)
        cuda, triton = placed(case, device, seed % 3), placed(case, device, ALIGNED)
        (one, one_counts), (other, other_counts) = run(cuda, "cuda", "cuda"), run(triton, "triton", "triton")
        assert_same_outcome(cuda, triton, f"case {seed}")
        assert_same_sums(one, other, f"case {seed}")
        assert torch.equal(one_counts, other_counts)


@BACKENDS
@pytest.mark.parametrize("layout", [ALIGNED, MIXED], ids=["aligned", "mixed"])
def test_large_tensors_beside_small_ones(device, backend, layout):
    options = OPTIONS[2]
    combinations = [c for c in COMBINATIONS if c[3] is None and c[0] == c[1] != torch.float16]
    combinations = combinations if backend == "cuda" else covering(2)
    check(case_of(combinations, options, 5, sizes=(*LARGE, 2**20, 17, 256)), device, backend, layout, "large")


@BACKENDS
def test_weight_may_stay_on_the_device(device, backend):
    combinations = COMBINATIONS[::5] if backend == "cuda" else covering(2)
    case = case_of(combinations, OPTIONS[2], 7)
    number, tensor = placed(case, device, ODD), placed(case, device, ODD)
    tensor.options["weight"] = torch.tensor([number.options["weight"]], device=device)
    one, other = run(number, backend, "number")[0], run(tensor, backend, "tensor")[0]
    assert_same_outcome(number, tensor, "weight as a tensor")
    assert_same_sums(one, other, "weight as a tensor")


@BACKENDS
def test_only_empty_tensors(device, backend):
    case = case_of(COMBINATIONS[:4], OPTIONS[2], 0, sizes=(0,))
    result, counts = run(placed(case, device, ALIGNED), backend, "empty")
    assert [x.item() for x in result] == [0, 0, 0, 0] and counts.tolist() == [0] * 4


@BACKENDS
def test_sums_of_tiny_attributions_do_not_vanish(device, backend):
    case = case_of([(torch.float32, torch.float32, torch.float32, None)], OPTIONS[2], 0, sizes=(100_003,))
    case = placed(case, device, ODD)
    case.gradients[0].fill_(-1e-25)
    case.parameters[0].fill_(1)
    case.references[0].zero_()
    case.options["gradient_scale"] = 1.0
    result, _ = run(case, backend, "tiny")
    assert result.penalty.item() == pytest.approx(100_003 * 1e-50, rel=1e-6)
    assert result.gradient_square.item() == pytest.approx(4 * 100_003 * 1e-100, rel=1e-6)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_and_written_exactly(device, backend, dtype):
    every = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    combination = [(dtype, dtype, dtype, None)]
    case = placed(case_of(combination, OPTIONS[0], 0, sizes=(2**16,)), device, ODD)
    case.options["gradient_scale"] = 1.0
    case.gradients[0].fill_(1)
    case.parameters[0].copy_(every)
    run(case, backend, "every value")
    # A = φ · 1 is stored: the same number again
    finite = every.isfinite()
    assert torch.equal(case.references[0][finite].view(torch.int16), every[finite].view(torch.int16))
    assert (case.references[0][~finite] == 0).all()
