"""What penalty_ means, on examples that can be checked by hand."""

import pytest
import torch

from ssiuu_fast.ops import penalty_

BACKENDS = ["reference", "cpp"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def three_parameters(dtype=torch.float32):
    """φ, g and A^ref; by hand A = (2·−1, −1·4, 3·2) = (−2, −4, 6), A − A^ref = (−1, 1, 5)."""
    parameters = torch.tensor([2.0, -1.0, 3.0], dtype=dtype)
    gradients = torch.tensor([-1.0, 4.0, 2.0], dtype=dtype)
    references = torch.tensor([-1.0, -5.0, 1.0], dtype=dtype)
    return gradients, parameters, references


def results(result):
    return tuple(x.item() for x in result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_parameters_by_hand(backend, dtype):
    g, phi, reference = three_parameters(dtype)
    result = penalty_([g], [phi], [reference], weight=0.5, backend=backend)
    # d = (−1, 1, 0): the third attribution is positive
    assert results(result) == (2.0, 2, 2.0**2 + 8.0**2, 0)
    # 0.5 · 2 · d · g
    assert g.tolist() == [1.0, 4.0, 0.0]
    assert reference.tolist() == [-2.0, -4.0, 6.0]
    assert phi.tolist() == [2.0, -1.0, 3.0]
    assert [x.dtype for x in result] == [torch.float64, torch.int64, torch.float64, torch.int64]
    assert all(x.shape == () and x.device.type == "cpu" for x in result)


def test_one_sided_punishes_only_growth(backend):
    g, phi, reference = three_parameters()
    result = penalty_([g], [phi], [reference], weight=0.5, one_sided=True, backend=backend)
    # d = (−1, 0, 0): the second rose from −5 to −4
    assert results(result) == (1.0, 2, 4.0, 0)
    assert g.tolist() == [1.0, 0.0, 0.0]
    assert reference.tolist() == [-2.0, -4.0, 6.0]


def test_references_stay_unless_updated(backend):
    g, phi, reference = three_parameters()
    result = penalty_([g], [phi], [reference], weight=0.5, update_references=False, backend=backend)
    assert results(result) == (2.0, 2, 68.0, 0)
    assert g.tolist() == [1.0, 4.0, 0.0]
    assert reference.tolist() == [-1.0, -5.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_reads_no_reference(backend, dtype):
    g, phi, _ = three_parameters(dtype)
    reference = torch.full((3,), torch.nan, dtype=dtype)
    result = penalty_([g], [phi], [reference], weight=0.5, first=True, backend=backend)
    assert results(result) == (0.0, 2, 0.0, 0)
    assert g.tolist() == [0.0, 0.0, 0.0]
    assert reference.tolist() == [-2.0, -4.0, 6.0]


def test_first_stores_even_without_update(backend):
    g, phi, reference = three_parameters()
    penalty_([g], [phi], [reference], weight=0.5, first=True, update_references=False, backend=backend)
    assert reference.tolist() == [-2.0, -4.0, 6.0]


def test_gradient_scale(backend):
    g, phi, reference = three_parameters()
    result = penalty_([g / 4], [phi], [reference], weight=0.5, gradient_scale=4.0, backend=backend)
    assert results(result) == (2.0, 2, 68.0, 0)


@pytest.mark.parametrize("out_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_added_to_and_the_gradient_stays(backend, dtype, out_dtype):
    g, phi, reference = three_parameters(dtype)
    out = torch.tensor([10.0, 20.0, 30.0], dtype=out_dtype or dtype)
    other = [tensor.clone() for tensor in (g, phi, reference)]
    result = penalty_(
        [g, other[0]], [phi, other[1]], [reference, other[2]], weight=0.5, out=[out, None], backend=backend
    )
    assert results(result) == (4.0, 4, 136.0, 0)
    assert out.tolist() == [11.0, 24.0, 30.0]
    assert g.tolist() == [-1.0, 4.0, 2.0]
    assert other[0].tolist() == [1.0, 4.0, 0.0]


def test_weight_as_tensor(backend):
    g, phi, reference = three_parameters()
    penalty_([g], [phi], [reference], weight=torch.tensor([0.5]), backend=backend)
    assert g.tolist() == [1.0, 4.0, 0.0]


def test_shapes_and_no_tensors(backend):
    result = penalty_([], [], [], weight=1.0, backend=backend, nonfinite_counts=torch.empty(0, dtype=torch.int64))
    assert results(result) == (0.0, 0, 0.0, 0)
    scalar = [torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(0.5)]
    empty = [torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3)]
    result = penalty_(*([a, b] for a, b in zip(scalar, empty, strict=True)), weight=1.0, backend=backend)
    # A = −1, d = −1.5, 2·d·g = 3
    assert results(result) == (2.25, 1, 9.0, 0)
    assert scalar[0].item() == 3.0 and scalar[2].item() == -1.0


def test_parameters_may_require_grad_and_are_not_touched(backend):
    g, phi, reference = three_parameters()
    parameter = torch.nn.Parameter(phi)
    versions = [tensor._version for tensor in (g, parameter, reference)]
    result = penalty_([g], [parameter], [reference], weight=0.5, backend=backend)
    assert not any(x.requires_grad for x in result)
    assert parameter._version == versions[1]
    # autograd must see that these have changed, as after any in-place operator
    assert g._version > versions[0] and reference._version > versions[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_nonfinite_in_every_position(backend, dtype, bad):
    size = 37
    for position in range(size):
        g = torch.full((size,), -1.0, dtype=dtype)
        g[position] = bad
        phi, reference, counts = torch.ones_like(g), torch.full_like(g, 2.0), torch.tensor([-1, -1])
        fine = [torch.zeros(1, dtype=dtype) for _ in range(3)]
        result = penalty_(
            [fine[0], g], [fine[1], phi], [fine[2], reference], weight=0.5, backend=backend, nonfinite_counts=counts
        )
        others = size - 1
        # A = −1, d = −3, 2·d·g = 6
        assert results(result) == (9.0 * others, others, 36.0 * others, 1)
        assert counts.tolist() == [0, 1]
        assert g[position] == 0 and reference[position] == 2
        assert (g == 3).sum() == others and (reference == -1).sum() == others


def test_nonfinite_with_first_and_with_out(backend):
    g, phi = torch.tensor([torch.inf, -1.0]), torch.ones(2)
    reference = torch.full((2,), torch.nan)
    result = penalty_([g], [phi], [reference], weight=1.0, first=True, backend=backend)
    assert results(result) == (0.0, 1, 0.0, 1)
    assert reference.tolist() == [0.0, -1.0]

    g, out = torch.tensor([torch.nan, -1.0]), torch.tensor([5.0, 5.0])
    penalty_([g], [phi], [reference], weight=1.0, out=[out], backend=backend)
    assert out.tolist() == [5.0, 5.0]


def test_a_reference_that_is_not_finite_counts_only_where_it_is_used(backend):
    g, phi = torch.tensor([-1.0, 1.0]), torch.ones(2)
    reference = torch.tensor([torch.nan, torch.nan])
    result = penalty_([g], [phi], [reference], weight=1.0, backend=backend)
    assert results(result) == (0.0, 1 - 1, 0.0, 1)
    assert g.tolist() == [0.0, 0.0]
    assert reference[0].isnan() and reference[1] == 1


def test_a_difference_that_overflows_is_left_out(backend):
    largest = torch.finfo(torch.float32).max
    g, phi, reference = torch.tensor([-largest]), torch.ones(1), torch.tensor([largest])
    result = penalty_([g], [phi], [reference], weight=1.0, backend=backend)
    assert results(result) == (0.0, 0, 0.0, 1)
    assert g.item() == 0 and reference.item() == largest


def test_an_attribution_too_large_for_its_reference_is_left_out(backend):
    g, phi, reference = torch.tensor([70_000.0]), torch.ones(1), torch.tensor([3.0], dtype=torch.float16)
    result = penalty_([g], [phi], [reference], weight=1.0, backend=backend)
    assert results(result) == (0.0, 0, 0.0, 1)
    assert reference.item() == 3


def test_sums_of_tiny_attributions_do_not_vanish(backend):
    g, phi, reference = torch.full((1000,), -1e-25), torch.ones(1000), torch.zeros(1000)
    result = penalty_([g], [phi], [reference], weight=1.0, backend=backend)
    assert result.penalty.item() == pytest.approx(1000 * 1e-50, rel=1e-6)
    assert result.gradient_square.item() == pytest.approx(4 * 1000 * 1e-100, rel=1e-6)


def test_two_steps_follow_algorithm_1(backend):
    generator = torch.Generator().manual_seed(0)
    phi = [torch.randn(5, 7, generator=generator) for _ in range(2)]
    steps = [[torch.randn(5, 7, generator=generator) for _ in range(2)] for _ in range(2)]
    reference = [torch.full((5, 7), torch.nan) for _ in range(2)]
    penalty_([g.clone() for g in steps[0]], phi, reference, weight=3.0, first=True, backend=backend)
    written = [g.clone() for g in steps[1]]
    result = penalty_(written, phi, reference, weight=3.0, backend=backend)

    # R as a function of φ with g and A^prev constant: autograd gives its gradient
    total = 0
    for i in range(2):
        parameter = phi[i].double().requires_grad_()
        attribution = parameter * steps[1][i].double()
        previous = phi[i].double() * steps[0][i].double()
        loss = ((attribution - previous).square() * (attribution < 0)).sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
        torch.testing.assert_close(written[i], (3 * gradient).float(), rtol=1e-5, atol=1e-6)
        total += loss.item()
    assert result.penalty.item() == pytest.approx(total, rel=1e-6)
