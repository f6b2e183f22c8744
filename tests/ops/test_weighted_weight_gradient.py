"""weighted_weight_gradient: the sum it is said to be, over dtypes, odd shapes, layouts and choices of samples."""

import pytest
import torch
from three_way import assert_three_way
from weight_gradient_cases import LAYOUTS, SINGLE, cases, laid_out, rounding_of, transcribed, truth_of

from ssiuu_fast.ops import weighted_weight_gradient

BACKENDS = pytest.mark.parametrize("backend", ["library", "reference"])


def run(case, backend, out=None):
    return weighted_weight_gradient(case.gradient, case.input, case.weights, rows=case.rows, out=out, backend=backend)


@BACKENDS
def test_worked_by_hand(backend):
    # dYᵀX of the first sample is [[3, 4], [6, 8]], of the second, of two tokens, [[1, 0], [0, 1]]
    gradient = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    input = torch.tensor([[[3.0, 4.0], [5.0, 5.0]], [[1.0, 0.0], [0.0, 1.0]]])
    weights = torch.tensor([10.0, -1.0])
    expected = torch.tensor([[29.0, 40.0], [60.0, 79.0]])
    assert torch.equal(weighted_weight_gradient(gradient, input, weights, backend=backend), expected)
    # as Conv1D has it
    assert torch.equal(weighted_weight_gradient(input, gradient, weights, backend=backend), expected.T)
    first = weighted_weight_gradient(gradient, input, weights, rows=slice(0, 1), backend=backend)
    assert first.tolist() == [[30, 40], [60, 80]]
    out = torch.ones(2, 2)
    assert weighted_weight_gradient(gradient, input, weights, out=out, backend=backend) is out
    assert torch.equal(out, 1 + expected)


@BACKENDS
@pytest.mark.parametrize("dtype", [*SINGLE, torch.float64])
def test_three_way(backend, dtype):
    for name, case in cases(dtype):
        result = run(case, backend)
        assert result.shape == case.shape and result.dtype == dtype
        if dtype == torch.float64:
            # the truth is of its own kind: what the order of a sum changes
            torch.testing.assert_close(result, truth_of(case), rtol=1e-12, atol=1e-12, msg=name)
        else:
            assert_three_way(result, transcribed(case), truth_of(case), name, rounding_of(case, backend == "library"))


@BACKENDS
@pytest.mark.parametrize("dtype", [*SINGLE, torch.float64])
@pytest.mark.parametrize("out_dtype", ["same", torch.float32])
def test_added_to_out(backend, dtype, out_dtype):
    for number, (name, case) in enumerate(cases(dtype, seeds=2)):
        generator = torch.Generator().manual_seed(number)
        before = torch.randn(case.shape, generator=generator).to(dtype if out_dtype == "same" else out_dtype)
        out = before.T.contiguous().T if number % 2 else before.clone()
        version = out._version
        assert run(case, backend, out) is out
        assert out._version > version
        truth = before.double() + truth_of(case)
        rounding = rounding_of(case, backend == "library", before)
        if dtype == torch.float64:
            torch.testing.assert_close(out, truth.to(out.dtype), rtol=1e-6, atol=1e-6, msg=name)
        else:
            assert_three_way(out, before + transcribed(case), truth, name, rounding)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_not_rounded_to_16_bits(backend, dtype):
    step = torch.finfo(dtype).eps
    weight = torch.tensor([1 + step / 2])
    value = torch.full((1, 1), 1.5, dtype=dtype)
    # a weight that was rounded would be 1; 1.5 · weight is nearest to the neighbour of 1.5
    assert weight.to(dtype).item() == 1
    result = weighted_weight_gradient(value, torch.ones_like(value), weight, backend=backend)
    assert result.item() == 1.5 + step


@BACKENDS
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 1])], ids=["slice", "indices"])
def test_samples_outside_of_rows_are_not_read(backend, rows):
    gradient, input = torch.randn(2, 5, 3, 4)
    weights = torch.tensor([torch.nan, 2.0, -3.0, torch.nan, torch.inf])
    expected = weighted_weight_gradient(gradient[1:3], input[1:3], weights[1:3], backend="reference")
    for tensor in (gradient, input):
        tensor[[0, 3, 4]] = torch.nan
    result = weighted_weight_gradient(gradient, input, weights, rows=rows, backend=backend)
    torch.testing.assert_close(result, expected)


@BACKENDS
def test_no_rows_are_zeros_and_leave_out_as_it_is(backend):
    gradient, input, weights = torch.full((3, 2, 4), torch.nan), torch.full((3, 2, 5), torch.nan), torch.ones(3)
    for rows in (slice(0, 0), torch.empty(0, dtype=torch.int64)):
        result = weighted_weight_gradient(gradient, input, weights, rows=rows, backend=backend)
        assert torch.equal(result, torch.zeros(4, 5))
        out = torch.randn(4, 5)
        kept = out.clone()
        assert torch.equal(
            weighted_weight_gradient(gradient, input, weights, rows=rows, out=out, backend=backend), kept
        )


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_stay_and_need_no_history(backend, layout):
    gradient = laid_out(torch.randn(3, 5, 4), layout).requires_grad_()
    input = laid_out(torch.randn(3, 5, 6), layout)
    weights = torch.randn(3, requires_grad=True)
    kept = [tensor.detach().clone() for tensor in (gradient, input, weights)]
    assert not weighted_weight_gradient(gradient, input, weights, backend=backend).requires_grad
    assert all(torch.equal(tensor, before) for tensor, before in zip((gradient, input, weights), kept, strict=True))


def test_auto_is_the_library():
    _, case = next(cases(torch.bfloat16, (((4, 33), 67, 41),)))
    assert torch.equal(run(case, "auto"), run(case, "library"))


def test_what_it_is_for():
    """∂ΣP/∂W from the backward of Σ w·log P, as autograd has it in a backward of its own."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 4, 5, generator=generator), torch.tensor([-1.0, 0.5, 2.0])
    weight = torch.randn(6, 5, generator=generator, requires_grad=True)
    output = x @ weight.T
    log_probs = -output.square().mean((1, 2))
    (expected,) = torch.autograd.grad(log_probs.exp().sum(), weight, retain_graph=True)
    (gradient,) = torch.autograd.grad((w * log_probs).sum(), output)
    ours = weighted_weight_gradient(gradient, x, log_probs.exp() / w)
    torch.testing.assert_close(ours, expected)


def arguments(**changes):
    good = {"gradient": torch.randn(2, 3, 4), "input": torch.randn(2, 3, 5), "weights": torch.ones(2), "out": None}
    return good | changes


def sharing(name):
    memory = torch.randn(100)
    start, shape = {"gradient": (18, (2, 3, 4)), "input": (10, (2, 3, 5)), "weights": (19, (2,))}[name]
    size = torch.Size(shape).numel()
    return {name: memory[start : start + size].view(shape), "out": memory[:20].view(4, 5)}


BAD = [
    ({"gradient": [1.0]}, TypeError, "gradient must be a tensor, not list"),
    ({"gradient": torch.ones(4, dtype=torch.int32)}, TypeError, "gradient is torch.int32: convert"),
    ({"gradient": torch.randn(4)}, ValueError, r"gradient has shape \(4,\): it must be \[batch, ..., features\]"),
    ({"input": torch.tensor(1.0)}, ValueError, r"input has shape \(\)"),
    ({"input": torch.randn(2, 3, 5).bfloat16()}, TypeError, "gradient is torch.float32 and input torch.bfloat16"),
    ({"input": torch.randn(2, 2, 5)}, ValueError, "all dimensions but the last must agree"),
    ({"input": torch.randn(2, 3, 5, device="meta")}, ValueError, "on meta: device and"),
    ({"weights": 2.0}, TypeError, "weights must be a tensor, not float"),
    ({"weights": torch.ones(2).double()}, TypeError, "weights is torch.float64: convert it to one of torch.float32"),
    ({"weights": torch.ones(2).bfloat16()}, TypeError, "weights is torch.bfloat16"),
    ({"weights": torch.ones(3)}, ValueError, r"weights is \(3,\) on cpu: pass one a sample, \(2,\) on cpu"),
    ({"weights": torch.ones(2, device="meta")}, ValueError, "weights is .* on meta"),
    ({"rows": [0]}, TypeError, "rows must be None, a slice or an int64 tensor, not list"),
    ({"rows": torch.tensor([True, False])}, TypeError, "rows is torch.bool"),
    ({"rows": torch.tensor([[0]])}, TypeError, r"rows is torch.int64 of shape \(1, 1\)"),
    ({"rows": torch.tensor([0, 2])}, ValueError, "rows holds 2: samples are 0 to 1"),
    ({"rows": torch.tensor([-1])}, ValueError, "rows holds -1"),
    ({"rows": torch.tensor([0], device="meta")}, ValueError, "rows is on meta and gradient on cpu"),
    ({"rows": slice(None, None, -1)}, ValueError, "step must be positive"),
    ({"out": torch.zeros(5, 4)}, ValueError, r"out is \(5, 4\) on cpu: it must be \(4, 5\) on cpu"),
    ({"out": torch.zeros(4, 5).half()}, TypeError, "out is torch.float16: convert it to one of torch.float32"),
    ({"out": torch.zeros(4, 5, requires_grad=True)}, ValueError, "out requires grad"),
    ({"out": torch.zeros(5).expand(4, 5)}, ValueError, "out of shape .* may share memory"),
    (sharing("gradient"), ValueError, "out and gradient share memory"),
    (sharing("input"), ValueError, "out and input share memory"),
    (sharing("weights"), ValueError, "out and weights share memory"),
    ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ({"backend": "cpp"}, RuntimeError, "there is no cpp kernel of weighted_weight_gradient yet"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_is_refused_before_anything_has_changed(changes, error, message):
    given = arguments(**changes)
    out = given["out"]
    kept = None if out is None else out.clone()
    with pytest.raises(error, match=message):
        weighted_weight_gradient(**given)
    assert out is None or torch.equal(out, kept)
