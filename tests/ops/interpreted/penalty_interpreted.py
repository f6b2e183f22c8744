"""penalty_ in Triton under Triton's interpreter; run by test_penalty_triton.py in a process of its own.

The interpreter truncates fp32 to bf16 instead of rounding: one unit in the last place is allowed there.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from penalty_cases import Case, copied, every_magnitude, random_case  # noqa: E402

from ssiuu_fast.kernels import penalty  # noqa: E402
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


def aligned(tensor):
    if tensor is None:
        return None
    if isinstance(tensor, Blockwise8):
        return Blockwise8(aligned(tensor.codes), aligned(tensor.absmax))
    # memory of torch starts at a multiple of 64 bytes
    return tensor.clone()


def outcome_of(case, places):
    """Bits that a call writes and returns, where index i is aligned if places[i]; and the launches it took."""
    lists = (case.gradients, case.parameters, case.references, case.outs)
    moved = [
        [None if t is None else aligned(t) if place else copied(t) for t, place in zip(tensors, places, strict=True)]
        for tensors in lists
    ]
    kinds = [penalty.kind_of(*row) for row in zip(*moved, strict=True)]
    assert [kind.aligned for kind in kinds] == [bool(place) for place in places]
    run, counts = Case(*moved, case.options), torch.full((len(places),), -1)
    result = run.run(penalty_, "triton", nonfinite_counts=counts)
    return [t.reshape(-1).view(torch.uint8) for t in (*run.written, *result, counts)], len(set(kinds))


@pytest.mark.parametrize("eight_bits", [False, True])
def test_same_bits_wherever_tensors_lie(eight_bits):
    generator = torch.Generator().manual_seed(0)
    sizes = (4096, 16, 33_008, 256)
    lists = [[torch.randn(size, generator=generator) * 0.1 for size in sizes] for _ in range(4)]
    lists[0][1][3] = torch.nan
    if eight_bits:
        lists[2] = [Blockwise8.encode(reference) for reference in lists[2]]
    case = Case(*lists, {"weight": 0.37})
    first, launches = outcome_of(case, (True,) * 4)
    assert launches == 1
    for places, expected in (((False,) * 4, 1), ((True, False, False, True), 2), ((False, True, True, False), 2)):
        other, launches = outcome_of(case, places)
        assert launches == expected
        assert all(torch.equal(one, mine) for one, mine in zip(first, other, strict=True)), places


def test_aligned_are_tensors_whose_every_address_and_size_is():
    def kind(size=32, gradient=0, parameter=0, reference=0, out=0):
        starts = (gradient, parameter, reference, out)
        return penalty.kind_of(*(torch.zeros(64, dtype=torch.bfloat16)[start : start + size] for start in starts))

    assert kind().aligned and kind(gradient=8, out=16).aligned
    for what in ({"size": 24}, {"gradient": 1}, {"parameter": 4}, {"reference": 2}, {"out": 7}):
        assert not kind(**what).aligned, what
    # codes are read many at a time, their absmax one by one
    tensor = torch.zeros(512)
    places = {False: torch.zeros(3)[1:], True: torch.zeros(3)[:2]}
    for absmax in places.values():
        assert penalty.kind_of(tensor, tensor, Blockwise8(tensor.to(torch.uint8), absmax), None).aligned
    codes = torch.zeros(513, dtype=torch.uint8)[1:]
    assert not penalty.kind_of(tensor, tensor, Blockwise8(codes, torch.zeros(2)), None).aligned


def test_one_copy_to_the_device_a_call_whatever_the_kinds(monkeypatch):
    copies, upload = [], penalty._upload
    monkeypatch.setattr(penalty, "_upload", lambda *arguments: copies.append(arguments) or upload(*arguments))
    kinds = ((32, torch.bfloat16), (32, torch.float32), (3, torch.float16))
    lists = [[torch.randn(size).to(dtype) for size, dtype in kinds] for _ in range(3)]
    compare(Case(*lists, [None] * 3, {"weight": 0.5}), "kinds")
    assert len(copies) == 1


def test_codes_of_every_magnitude():
    compare(every_magnitude(), "codes")


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
