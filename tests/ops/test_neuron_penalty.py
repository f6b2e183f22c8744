"""neuron_penalty: by hand, at its edges, and against fp64."""

import pytest
import torch
from neuron_cases import BACKENDS, DTYPES, INTERPRETED, KERNEL, assert_alike, assert_within, cases, filled

from ssiuu_fast.ops import neuron_attribution, neuron_penalty

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """What torch.empty returns is NaN: an element that isn't written fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def toy(dtype):
    hidden = torch.tensor([[[1, 2], [3, -4]], [[5, 6], [-7, 8]]], dtype=dtype)
    gradient = torch.tensor([[[1, -1], [2, 1]], [[-1, 0], [1, 2]]], dtype=dtype)
    # products: [[1, -2], [6, -4]] and [[-5, 0], [-7, 16]]
    return hidden, gradient


def numbers(result):
    return [tensor.tolist() for tensor in result]


def sums_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_sample_by_hand(backend, dtype):
    reference = torch.tensor([[1, -2], [-20, 3]], dtype=sums_dtype(dtype))
    hidden, gradient = toy(dtype)
    # A = [[7, -6], [-12, 16]], d = [[0, -4], [8, 0]], and 2 · weight = 1
    result = neuron_penalty(hidden, gradient, reference, weight=0.5, per_sample=True, backend=backend)
    assert result.injection is gradient
    assert numbers(result) == [[[[0, 4], [0, -4]], [[-8, 0], [8, 0]]], [[7, -6], [-12, 16]], 80, 2]
    assert [tensor.dtype for tensor in result] == [dtype, sums_dtype(dtype), torch.float64, torch.int64]

    hidden, gradient = toy(dtype)
    # −12 is above its reference
    options = {"weight": torch.tensor([0.5]), "per_sample": True, "one_sided": True}
    result = neuron_penalty(hidden, gradient, reference, backend=backend, **options)
    assert numbers(result) == [[[[0, 4], [0, -4]], [[0, 0], [0, 0]]], [[7, -6], [-12, 16]], 16, 2]


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_batch_by_hand(backend, dtype):
    hidden, gradient = toy(dtype)
    reference = torch.tensor([-2, 0], dtype=sums_dtype(dtype))
    # A = [-5, 10], d = [-3, 0]
    result = neuron_penalty(hidden, gradient, reference, weight=0.5, per_sample=False, backend=backend)
    assert numbers(result) == [[[[-3, 0], [-6, 0]], [[3, 0], [-3, 0]]], [-5, 10], 9, 1]

    hidden, gradient = toy(dtype)
    first = neuron_penalty(hidden, gradient, None, weight=0.5, per_sample=False, backend=backend)
    assert numbers(first) == [[[[0, 0], [0, 0]], [[0, 0], [0, 0]]], [-5, 10], 0, 1]


@EACH_BACKEND
@pytest.mark.parametrize("mask", [torch.tensor([[0, 7], [1, 0]]), torch.tensor([[False, True], [True, False]])])
def test_mask_by_hand(backend, mask):
    hidden, gradient = toy(torch.float32)
    reference = torch.tensor([[1.0, -2.0], [-20.0, 3.0]])
    # A = [[6, -4], [-5, 0]], d = [[0, -2], [15, 0]]; tokens that don't count get 0
    result = neuron_penalty(hidden, gradient, reference, mask, weight=0.5, per_sample=True, backend=backend)
    assert numbers(result) == [[[[0, 0], [0, -2]], [[-15, 0], [0, 0]]], [[6, -4], [-5, 0]], 229, 2]


def test_kernel_against_fp64_and_the_reference():
    for name, case in cases():
        truth = case.run("reference", double=True)
        plain, kernel = case.run("reference"), case.run(KERNEL)
        assert_within(kernel, plain, truth, case.hidden[..., :1].numel() + 1, name)
        assert_alike(kernel, plain, name)


@EACH_BACKEND
def test_tokens_left_out_may_hold_anything(backend):
    for name, case in cases():
        if case.mask is not None:
            clean, poison = filled(case, 0, 0).run(backend), filled(case, -torch.inf, torch.nan).run(backend)
            assert all(torch.equal(a, b) for a, b in zip(clean, poison, strict=True)), name


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_nonfinite_attribution_adds_nothing(backend, dtype, per_sample):
    hidden, gradient = -torch.ones(2, 3, 20, dtype=dtype), torch.ones(2, 3, 20, dtype=dtype)
    hidden[1, 0, 13] = torch.nan
    gradient[1, 2, 4] = torch.inf
    result = neuron_penalty(
        hidden, gradient, torch.zeros_like(hidden[:, 0] if per_sample else hidden[0, 0], dtype=sums_dtype(dtype)),
        weight=0.5, per_sample=per_sample, backend=backend,
    )  # fmt: skip
    # A is −3 a sample and −6 a batch everywhere else; d = A
    row = 1 if per_sample else slice(None)
    assert result.attribution[row][..., 13].isnan().all() and (result.attribution[row][..., 4] == -torch.inf).all()
    assert (result.injection[row][..., [4, 13]] == 0).all()
    assert result.injection.isfinite().all()
    assert (result.penalty.item(), result.negative.item()) == ((38 * 9, 38) if per_sample else (18 * 36, 18))


@EACH_BACKEND
def test_a_difference_beyond_the_range_adds_nothing(backend):
    hidden, gradient = torch.tensor([[[-3e38, -1.0]]]), torch.ones(1, 1, 2)
    result = neuron_penalty(hidden, gradient, torch.tensor([3e38, 1.0]), weight=0.5, per_sample=False, backend=backend)
    assert result.injection.flatten().tolist() == [0, -2]
    assert (result.penalty.item(), result.negative.item()) == (4, 1)


@EACH_BACKEND
def test_an_unknown_reference_is_left_out(backend):
    hidden, gradient = toy(torch.float32)
    # A = [-5, 10], and the first has nothing to be compared with
    reference = torch.tensor([torch.nan, 0.0])
    result = neuron_penalty(hidden, gradient, reference, weight=0.5, per_sample=False, backend=backend)
    assert numbers(result) == [[[[0, 0], [0, 0]], [[0, 0], [0, 0]]], [-5, 10], 0, 0]


@EACH_BACKEND
def test_an_infinite_factor_stays_away_from_tokens_left_out(backend):
    hidden = torch.full((1, 2, 1), -50.0)
    # A = d = −50, and 2 · weight · d is beyond the range
    result = neuron_penalty(
        hidden,
        torch.ones(1, 2, 1),
        torch.zeros(1),
        torch.tensor([[1, 0]]),
        weight=1e38,
        per_sample=False,
        backend=backend,
    )
    assert result.injection.flatten().tolist() == [-torch.inf, 0] and result.penalty == 2500


@EACH_BACKEND
@pytest.mark.parametrize("per_sample", [True, False])
def test_agrees_with_neuron_attribution(backend, per_sample):
    hidden, gradient = torch.randn(2, 2, 40, 70, generator=torch.Generator().manual_seed(0))
    sums = neuron_attribution(hidden, gradient, backend=backend).sum
    result = neuron_penalty(hidden, gradient, None, weight=1.0, per_sample=per_sample, backend=backend)
    expected = sums if per_sample else sums.sum(0)
    torch.testing.assert_close(result.attribution, expected, rtol=1e-6, atol=1e-5)


@EACH_BACKEND
def test_the_gradient_is_marked_as_written(backend):
    hidden, gradient = toy(torch.float32)
    hidden.requires_grad_()
    product = hidden * gradient
    before = gradient._version
    result = neuron_penalty(hidden, gradient, None, weight=1.0, per_sample=True, backend=backend)
    assert gradient._version > before and not any(tensor.requires_grad for tensor in result)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        neuron_penalty(*toy(torch.float32), None, weight=1.0, per_sample=True, backend=backend)


def test_long_sums_stay_exact():
    # one fp32 running sum would be off by about 1e-3 of this; several parts where a backend cuts them
    hidden = torch.rand(2, 1_100 if INTERPRETED else 16_384, 8, generator=torch.Generator().manual_seed(0))
    expected = hidden.double().sum((0, 1)).float()
    result = neuron_penalty(hidden, torch.ones_like(hidden), None, weight=1.0, per_sample=False, backend=KERNEL)
    torch.testing.assert_close(result.attribution, expected, rtol=1e-7, atol=0)


@EACH_BACKEND
def test_addresses_beyond_32_bits(backend, monkeypatch):
    # 4 GB of addresses, of which a few pages are touched
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2**31 + 4, dtype=torch.bfloat16)
    gradient = memory.as_strided((3, 1, 4), (2**30, 4, 1)).fill_(1)
    reference = torch.zeros(3, 4)
    # A = d = −2
    options = {"weight": 1, "per_sample": True, "backend": backend}
    result = neuron_penalty(torch.full((3, 1, 4), -2, dtype=gradient.dtype), gradient, reference, **options)
    assert (gradient == -4).all() and result.negative == 12
    assert (neuron_attribution(gradient, gradient, backend=backend).sum == 16).all()


@pytest.fixture
def restore_threads_and_unit():
    from ssiuu_fast import _C

    threads, unit = torch.get_num_threads(), _C.cpu_unit()
    yield
    torch.set_num_threads(threads)
    _C.use_cpu_unit(unit)


@pytest.mark.parametrize("per_sample", [True, False])
def test_same_bits_for_any_number_of_threads_and_any_unit(restore_threads_and_unit, per_sample):
    from ssiuu_fast import _C

    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        hidden, gradient = torch.randn(2, 3, 64, 1031, generator=generator).to(dtype)
        reference = torch.randn(3, 1031, generator=generator, dtype=sums_dtype(dtype))
        reference = reference if per_sample else reference[0]
        outcomes = []
        for unit in _C.cpu_units():
            for count in (1, 2, 5):
                _C.use_cpu_unit(unit)
                torch.set_num_threads(count)
                options = {"weight": 0.1, "per_sample": per_sample, "backend": "cpp"}
                outcomes.append(neuron_penalty(hidden, gradient.clone(), reference, **options))
        for other in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
