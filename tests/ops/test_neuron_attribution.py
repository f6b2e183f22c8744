"""neuron_attribution: by hand, at its edges, and against fp64."""

import pytest
import torch
from neuron_cases import BACKENDS, DTYPES, INTERPRETED, KERNEL, cases, filled, strided

from ssiuu_fast.ops import neuron_attribution

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """What torch.empty returns is NaN: an element that isn't written fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lists(result):
    return [tensor.tolist() for tensor in result]


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_samples_by_hand(backend, dtype):
    hidden = torch.tensor([[[1, 2], [3, -4]], [[5, 6], [-7, 8]]], dtype=dtype)
    gradient = torch.tensor([[[1, -1], [2, 1]], [[-1, 0], [1, 2]]], dtype=dtype)
    # products: [[1, -2], [6, -4]] and [[-5, 0], [-7, 16]]
    result = neuron_attribution(hidden, gradient, backend=backend)
    assert lists(result) == [[[6, -2], [-5, 16]], [[1, -4], [-7, 0]], [[7, -6], [-12, 16]]]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(tensor.dtype == expected for tensor in result)

    mask = torch.tensor([[0, 7], [1, 0]])
    for same in (mask, mask.bool()):
        masked = neuron_attribution(hidden, gradient, same, backend=backend)
        assert lists(masked) == [[[6, -4], [-5, 0]]] * 3


@EACH_BACKEND
def test_samples_without_tokens(backend):
    hidden = torch.randn(2, 3, 4)
    nothing = [[float("-inf")] * 4, [float("inf")] * 4, [0.0] * 4]
    mask = torch.tensor([[0, 0, 0], [1, 0, 0]])
    masked = neuron_attribution(hidden, hidden, mask, backend=backend)
    assert [tensor[0].tolist() for tensor in masked] == nothing
    assert all(torch.equal(tensor[1], hidden[1, 0].square()) for tensor in masked)
    without = neuron_attribution(hidden[:, :0], hidden[:, :0], backend=backend)
    assert [tensor[1].tolist() for tensor in without] == nothing
    assert neuron_attribution(hidden[:0], hidden[:0], backend=backend).sum.shape == (0, 4)
    assert neuron_attribution(hidden[..., :0], hidden[..., :0], backend=backend).max.shape == (2, 0)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 3, 6])
def test_nan_propagates_from_counted_tokens_only(backend, dtype, position):
    hidden = torch.randn(2, 7, 20).to(dtype)
    gradient = torch.ones_like(hidden)
    hidden[1, position, 13] = torch.nan
    for tensor in neuron_attribution(hidden, gradient, backend=backend):
        assert tensor.isnan().nonzero().tolist() == [[1, 13]]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, position] = False
    assert all(tensor.isfinite().all() for tensor in neuron_attribution(hidden, gradient, mask, backend=backend))


@EACH_BACKEND
def test_no_gradient_history(backend):
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    assert not any(t.requires_grad for t in neuron_attribution(hidden, torch.ones(1, 2, 3), backend=backend))


def assert_near_the_truth(kernel, hidden, gradient, mask, name):
    """No further from float64 than plain torch and one rounding."""
    truth = neuron_attribution(hidden.double(), gradient.double(), mask, backend="reference")
    transcribed = neuron_attribution(hidden, gradient, mask, backend="reference")
    for field in ("max", "min", "sum"):
        exact, plain, mine = (getattr(result, field) for result in (truth, transcribed, kernel))
        if exact.numel() == 0:
            continue
        error = (mine.double() - exact).abs().nan_to_num(0)
        # where the truth is fp64 itself, sums of it differ by their order
        additions = hidden.shape[1] + 1 if hidden.dtype == torch.float64 else 1
        rounding = additions * torch.finfo(mine.dtype).eps * exact.abs().nan_to_num(0, posinf=0).max()
        bound = (plain.double() - exact).abs().nan_to_num(0).max() + rounding
        worst = error.argmax()
        assert error.max() <= bound, f"{name}: {field}, worst at {worst}: {mine.flatten()[worst]}"
        assert torch.equal(mine.isinf(), exact.isinf()), name
        if field != "sum":
            assert torch.equal(mine, plain), name


def test_kernel_against_fp64_and_the_reference():
    for name, case in cases():
        assert_near_the_truth(case.attribution(KERNEL), case.hidden, case.gradient, case.mask, name)


@pytest.mark.parametrize("dtype", DTYPES)
# many tokens of few neurons, which some backends cut
@pytest.mark.parametrize("shape", [(4, 33, 1031), (1, 2099, 67), (7, 2, 2048)])
@pytest.mark.skipif(INTERPRETED, reason="slow there")
def test_larger_shapes(dtype, shape):
    generator = torch.Generator().manual_seed(sum(shape))
    hidden, gradient = strided(shape, dtype, generator), strided(shape, dtype, generator)
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    for counted in (None, mask):
        kernel = neuron_attribution(hidden, gradient, counted, backend=KERNEL)
        assert_near_the_truth(kernel, hidden, gradient, counted, f"{dtype}, {shape}")


@EACH_BACKEND
def test_tokens_left_out_may_hold_anything(backend):
    for name, case in cases():
        if case.mask is not None:
            clean = filled(case, 0, 0).attribution(backend)
            poison = filled(case, -torch.inf, torch.nan).attribution(backend)
            assert all(torch.equal(a, b) for a, b in zip(clean, poison, strict=True)), name


def test_long_sums_stay_exact():
    # one fp32 running sum would be off by about 1e-3 of this; several parts where a backend cuts them
    tokens = 2_100 if INTERPRETED else 32_768
    hidden = torch.rand(1, tokens, 8, generator=torch.Generator().manual_seed(0))
    hidden[0, tokens - 3, 5] = torch.nan
    hidden[0, 1, 6] = torch.nan
    result = neuron_attribution(hidden, torch.ones_like(hidden), backend=KERNEL)
    torch.testing.assert_close(result.sum, hidden.double().sum(1).float(), rtol=1e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(result.max, hidden.amax(1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(result.min, hidden.amin(1), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_same_bits_for_any_number_of_threads_and_any_unit(restore_threads):
    from ssiuu_fast import _C

    for dtype in DTYPES:
        hidden, gradient = torch.randn(2, 3, 64, 1031).to(dtype)
        outcomes = []
        for unit in _C.cpu_units():
            for count in (1, 2, 5):
                _C.use_cpu_unit(unit)
                torch.set_num_threads(count)
                outcomes.append(neuron_attribution(hidden, gradient, backend="cpp"))
        for other in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


GOOD = torch.randn(2, 3, 4)
BAD = [
    (GOOD[0], GOOD[0], None, ValueError, r"hidden has shape \(3, 4\)"),
    (GOOD, GOOD[:, :2], None, ValueError, "gradient is .*they must agree"),
    (GOOD, GOOD.double(), None, ValueError, "gradient is torch.float64"),
    (GOOD.int(), GOOD.int(), None, TypeError, "hidden is torch.int32"),
    (GOOD, GOOD.transpose(1, 2).contiguous().transpose(1, 2), None, ValueError, r"gradient has strides .*contiguous"),
    (GOOD, GOOD, torch.ones(2, 3), TypeError, "mask is torch.float32"),
    (GOOD, GOOD, torch.ones(2, 4, dtype=torch.bool), ValueError, r"mask is \(2, 4\)"),
    (GOOD, [1.0], None, TypeError, "gradient must be a tensor, not list"),
]


@EACH_BACKEND
@pytest.mark.parametrize(("hidden", "gradient", "mask", "error", "message"), BAD, ids=[row[4] for row in BAD])
def test_bad_input(backend, hidden, gradient, mask, error, message):
    with pytest.raises(error, match=message):
        neuron_attribution(hidden, gradient, mask, backend=backend)
