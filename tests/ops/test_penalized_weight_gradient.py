"""penalized_weight_gradient: the plain gradient and that of the penalty, the reference and the sums."""

import pytest
import torch
from weight_gradient_cases import (
    OPTIONS,
    SINGLE,
    cases,
    check_penalized,
    check_penalized_exact,
    make_case,
    make_state,
    truth_of,
)

from ssiuu_fast.ops import Blockwise8, both_weight_gradients, penalized_weight_gradient, penalty_

BACKENDS = pytest.mark.parametrize("backend", ["library", "reference"])


def test_fields():
    assert ["gradient", *penalty_([], [], [], weight=1.0)._fields] == list(
        penalized_weight_gradient(**arguments())._fields
    )


@BACKENDS
def test_worked_by_hand(backend):
    # g = 10 · [[3, 4], [6, 8]] − [[0, 0], [5, 0]], the plain gradient is their sum without weights
    gradient = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])
    input = torch.tensor([[[3.0, 4.0]], [[5.0, 0.0]]])
    # A = [[−30, 40], [55, −160]]: d = [[−20, 0], [0, 40]]
    parameter = torch.tensor([[-1.0, 1.0], [1.0, -2.0]])
    reference = torch.tensor([[-10.0, 7.0], [7.0, -200.0]])
    given = (gradient, input, torch.tensor([10.0, -1.0]), parameter)
    stored = reference.clone()
    result = penalized_weight_gradient(*given, stored, weight=0.5, backend=backend)
    # plain + d · g
    assert result.gradient.tolist() == [[3 - 600, 4], [11, 8 + 3200]]
    assert stored.tolist() == [[-30, 40], [55, -160]]
    assert result.penalty == 20**2 + 40**2 and result.negative == 2 and result.nonfinite == 0
    assert result.gradient_square == 4 * (600**2 + 3200**2)
    # only what fell counts; the reference stays
    out = torch.ones(2, 2)
    options = {"weight": torch.tensor([0.5]), "one_sided": True, "update_reference": False, "out": out}
    result = penalized_weight_gradient(*given, reference, backend=backend, **options)
    assert result.gradient is out and out.tolist() == [[4 - 600, 5], [12, 9]]
    assert reference.tolist() == [[-10, 7], [7, -200]] and result.penalty == 400
    # no reference yet
    new = torch.full((2, 2), torch.nan)
    result = penalized_weight_gradient(*given, new, weight=0.5, first=True, gradient_scale=2.0, backend=backend)
    assert result.gradient.tolist() == [[3, 4], [11, 8]] and new.tolist() == [[-60, 80], [110, -320]]
    assert [float(total) for total in result[1:]] == [0, 2, 0, 0]


@BACKENDS
@pytest.mark.parametrize("dtype", SINGLE)
def test_random_numbers(backend, dtype):
    for number, (name, case) in enumerate(cases(dtype, seeds=4)):
        check_penalized(name, case, number, backend)


@pytest.mark.parametrize("poisoned", [False, True])
def test_whole_numbers_in_the_library_are_the_references(poisoned):
    for number, (name, case) in enumerate(cases(torch.float32, whole=True)):
        # penalty_ in C++ sums a few squares in float32
        check_penalized_exact(name, case, number, "library", poisoned=poisoned, sums=1e-6)


@BACKENDS
def test_float64(backend):
    for number, (name, case) in enumerate(cases(torch.float64, seeds=2)):
        state = make_state(case, number)._replace(out=None)
        g = truth_of(case)
        attribution = state.parameter * g
        d = torch.where(attribution < 0, attribution - state.reference[1], 0)
        gradient, reference, penalty, *_ = state.run(case, {"weight": 0.5}, backend)
        expected = truth_of(case, torch.ones_like(case.weights)) + d * g
        for one, other in ((gradient, expected), (reference, attribution), (penalty, d.square().sum())):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=name)


def test_it_is_both_weight_gradients_and_the_penalty():
    case = make_case(((4, 33), 67, 41), torch.bfloat16, 0, torch.Generator().manual_seed(0))
    parameter, reference = torch.randn(2, 67, 41)
    stored = [Blockwise8.encode(reference) for _ in range(2)]
    ours = penalized_weight_gradient(*case[:3], parameter, stored[0], weight=0.5)
    plain, g = both_weight_gradients(*case[:3])
    sums = penalty_([g], [parameter], [stored[1]], out=[plain], weight=0.5)
    for one, other in zip((*ours, stored[0].decode()), (plain, *sums, stored[1].decode()), strict=True):
        assert torch.equal(one, other)


@BACKENDS
def test_a_parameter_that_requires_grad_and_versions(backend):
    given = arguments()
    given["parameter"].requires_grad_()
    out = torch.zeros(4, 5)
    versions = given["reference"]._version, out._version
    result = penalized_weight_gradient(**given, out=out, backend=backend)
    assert not result.gradient.requires_grad
    assert given["reference"]._version > versions[0] and out._version > versions[1]


def test_options_cover_what_there_is():
    assert len({tuple(options.items()) for options in OPTIONS}) == 6


def arguments(**changes):
    good = {
        "gradient": torch.randn(2, 3, 4),
        "input": torch.randn(2, 3, 5),
        "weights": torch.ones(2),
        "parameter": torch.randn(4, 5),
        "reference": torch.randn(4, 5),
        "weight": 1.0,
    }
    return good | changes


def shared(one, other):
    memory = torch.randn(40)
    return {one: memory[:20].view(4, 5), other: memory[10:30].view(4, 5)}


BAD = [
    ({"weights": torch.ones(2).double()}, TypeError, "weights is torch.float64"),
    ({"parameter": torch.randn(5, 4)}, ValueError, r"parameter is \(5, 4\) on cpu: it must be \(4, 5\) on cpu"),
    ({"parameter": torch.randn(5, 4).T}, ValueError, "parameter of shape .* has strides"),
    ({"parameter": torch.randn(4, 5).double()}, TypeError, "parameter is torch.float64"),
    ({"reference": torch.randn(4, 4)}, ValueError, r"reference is \(4, 4\)"),
    ({"reference": torch.randn(4, 5, requires_grad=True)}, ValueError, "reference requires grad"),
    ({"reference": Blockwise8.empty_like(torch.zeros(4, 4))}, ValueError, r"reference is \(4, 4\)"),
    ({"out": torch.zeros(5, 4).T}, ValueError, "out of shape .* has strides"),
    ({"out": torch.zeros(4, 5).bfloat16()}, TypeError, "out is torch.bfloat16"),
    (shared("out", "parameter"), ValueError, "out and parameter share memory"),
    (shared("out", "reference"), ValueError, "out and reference share memory"),
    (shared("reference", "parameter"), ValueError, "reference and parameter share memory"),
    ({"weight": float("nan")}, ValueError, "weight must be finite"),
    ({"weight": torch.ones(2)}, ValueError, r"weight is torch.float32 of shape \(2,\)"),
    ({"gradient_scale": float("inf")}, ValueError, "gradient_scale must be finite, not inf"),
    ({"backend": "cpp"}, RuntimeError, "there is no cpp kernel of penalized_weight_gradient yet"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_is_refused_before_anything_has_changed(changes, error, message):
    given = arguments(**changes)
    written = [tensor for tensor in (given["reference"], given.get("out")) if isinstance(tensor, torch.Tensor)]
    kept = [tensor.clone() for tensor in written]
    with pytest.raises(error, match=message):
        penalized_weight_gradient(**given)
    assert all(torch.equal(tensor, before) for tensor, before in zip(written, kept, strict=True))
