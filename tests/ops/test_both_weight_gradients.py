"""both_weight_gradients: the plain sum and the weighted one, over dtypes, shapes, layouts and choices of samples."""

import pytest
import torch
from weight_gradient_cases import SINGLE, cases, check_both, truth_of

from ssiuu_fast.ops import both_weight_gradients, weighted_weight_gradient

BACKENDS = pytest.mark.parametrize("backend", ["library", "reference"])


@BACKENDS
def test_worked_by_hand(backend):
    # dYᵀX of the first sample is [[3, 4], [6, 8]], of the second [[0, 0], [5, 0]]
    gradient = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])
    input = torch.tensor([[[3.0, 4.0]], [[5.0, 0.0]]])
    result = both_weight_gradients(gradient, input, torch.tensor([10.0, -1.0]), backend=backend)
    assert result.plain.tolist() == [[3, 4], [11, 8]]
    assert result.weighted.tolist() == [[30, 40], [55, 80]]
    out = torch.ones(2, 2), None
    again = both_weight_gradients(gradient, input, torch.tensor([10.0, -1.0]), out=out, backend=backend)
    assert again.plain is out[0] and out[0].tolist() == [[4, 5], [12, 9]]
    assert torch.equal(again.weighted, result.weighted)


@BACKENDS
@pytest.mark.parametrize("dtype", SINGLE)
def test_three_way(backend, dtype):
    for number, (name, case) in enumerate(cases(dtype)):
        check_both(name, case, number, backend)


@BACKENDS
def test_float64(backend):
    for name, case in cases(torch.float64, seeds=2):
        result = both_weight_gradients(*case[:3], rows=case.rows, backend=backend)
        plain = truth_of(case, torch.ones_like(case.weights))
        torch.testing.assert_close(result.plain, plain, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(result.weighted, truth_of(case), rtol=1e-12, atol=1e-12, msg=name)


def test_auto_is_two_products_of_the_library():
    gradient, input, weights = torch.randn(3, 5, 4), torch.randn(3, 5, 6), torch.randn(3)
    result = both_weight_gradients(gradient, input, weights)
    assert torch.equal(result.weighted, weighted_weight_gradient(gradient, input, weights, backend="library"))
    assert torch.equal(result.plain, torch.mm(gradient.flatten(0, 1).T, input.flatten(0, 1)))


def pair():
    memory = torch.zeros(30)
    return memory[:20].view(4, 5), memory[10:].view(4, 5)


BAD = [
    ({"weights": torch.ones(3)}, ValueError, r"weights is \(3,\)"),
    ({"rows": torch.tensor([2])}, ValueError, "rows holds 2"),
    ({"out": torch.zeros(4, 5)}, TypeError, "out must be None or two tensors .*, not Tensor"),
    ({"out": (torch.zeros(4, 5),)}, TypeError, "out must be None or two tensors"),
    ({"out": (torch.zeros(4, 5), torch.zeros(4, 4))}, ValueError, r"out\[1\] is \(4, 4\)"),
    ({"out": (torch.zeros(4, 5).half(), None)}, TypeError, r"out\[0\] is torch.float16"),
    ({"out": pair()}, ValueError, r"out\[0\] and out\[1\] share memory"),
    ({"backend": "cuda"}, RuntimeError, "there is no cuda kernel of both_weight_gradients yet"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_is_refused_before_anything_has_changed(changes, error, message):
    given = {"gradient": torch.randn(2, 3, 4), "input": torch.randn(2, 3, 5), "weights": torch.ones(2)} | changes
    outs = [out for out in given.get("out", ()) if out is not None]
    with pytest.raises(error, match=message):
        both_weight_gradients(**given)
    assert all((out == 0).all() for out in outs)
