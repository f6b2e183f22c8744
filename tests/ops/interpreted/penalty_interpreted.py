"""penalty_ in Triton under Triton's interpreter; run by test_penalty_triton.py in a process of its own.

The interpreter truncates fp32 to bf16 instead of rounding: one unit in the last place is allowed there.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from penalty_cases import Case, random_case  # noqa: E402

from ssiuu_fast.ops import Blockwise8, penalty_  # noqa: E402


def assert_same(triton, reference, what):
    if triton.dtype == torch.bfloat16:
        # neighbours of one sign are neighbours as integers
        kernel, plain = (t[~reference.isnan()].view(torch.int16).int() for t in (triton, reference))
        assert ((kernel - plain).abs() <= 1).all(), what
        assert torch.equal(triton.isnan(), reference.isnan()), what
    else:
        torch.testing.assert_close(triton, reference, rtol=0, atol=0, equal_nan=True, msg=what)


def compare(case, what):
    runs = []
    for backend in ("reference", "triton"):
        run, counts = case.copy(), torch.full((len(case.gradients),), -1)
        result = run.run(penalty_, backend, nonfinite_counts=counts)
        runs.append((run.written, result, counts))
    (plain_tensors, plain, plain_counts), (triton_tensors, triton, triton_counts) = runs
    for kernel, reference in zip(triton_tensors, plain_tensors, strict=True):
        assert_same(kernel, reference, what)
    assert torch.equal(triton_counts, plain_counts)
    for kernel, reference in zip(triton, plain, strict=True):
        torch.testing.assert_close(kernel, reference, rtol=1e-12, atol=0, msg=what)


def small(case):
    return all(tensor.numel() < 50_000 for tensor in case.gradients)


@pytest.mark.parametrize("poison", [False, True])
def test_random_cases_equal_the_reference(poison):
    for seed in range(60):
        case = random_case(torch.Generator().manual_seed(seed), poison=poison)
        if small(case):
            compare(case, f"case {seed}")


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_tensor_of_several_chunks_beside_an_empty_one(eight_bits):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(size, generator=generator) for size in (40_001, 0, 5)] for _ in range(3)]
    if eight_bits:
        lists[2] = [Blockwise8.encode(reference) for reference in lists[2]]
    compare(Case(*lists, [None] * 3, {"weight": 0.5}), "chunks")


def test_codes_of_every_magnitude():
    generator = torch.Generator().manual_seed(0)
    size = 20_000
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    parameters = signs * 10 ** (45 * torch.rand(size, generator=generator).sort().values - 38)
    parameters[5000:10_000] = signs[5000:10_000] * 10 ** (8 * torch.rand(5000, generator=generator) - 8)
    references = Blockwise8.empty_like(parameters)
    compare(Case([torch.ones(size)], [parameters], [references], [None], {"weight": 0.5, "first": True}), "codes")


def test_weight_as_tensor():
    tensors = [torch.tensor([value]) for value in (-1.0, 2.0, -1.0)]
    penalty_(*([t] for t in tensors), weight=torch.tensor([0.5]), backend="triton")
    # A = −2, d = −1
    assert [t.item() for t in tensors] == [1.0, 2.0, -2.0]


def test_only_empty_tensors():
    empty = [torch.empty(0) for _ in range(3)]
    result = penalty_(*([t] for t in empty), weight=1.0, backend="triton")
    assert [x.item() for x in result] == [0, 0, 0, 0]


def test_float64_is_refused():
    tensors = [torch.ones(2, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(RuntimeError, match="float64"):
        penalty_(*([t] for t in tensors), weight=1.0, backend="triton")
