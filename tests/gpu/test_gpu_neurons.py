"""neuron_attribution and neuron_penalty on a GPU, over shapes, strides, masks and values that are no numbers."""

import itertools

import pytest
import torch
from neuron_grid import (
    DTYPES,
    LAYOUTS,
    check_attribution,
    check_exact_penalty,
    check_penalty,
    check_poisoned_attribution,
)

from ssiuu_fast.ops import neuron_attribution, neuron_penalty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
# [batch, tokens, neurons]
SHAPES = [
    (3, 0, 17),
    (0, 5, 17),
    (2, 5, 0),
    (1, 1, 1),
    (3, 1, 67),
    (2, 2, 513),
    (4, 31, 1031),
    (16, 31, 8),
    (3, 512, 257),
    (2, 512, 1024),
    (1, 4099, 67),
    (1, 32_768, 1),
    (2, 32_768, 3),
    (1, 32_768, 129),
]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def kinds(backend, shape):
    """Dtypes and layouts: all for CUDA, and each of them once for Triton, which compiles a kernel a pair."""
    if backend == "cuda":
        return list(itertools.product(DTYPES, LAYOUTS))
    # another pairing from shape to shape
    return [(dtype, LAYOUTS[(i + SHAPES.index(shape)) % 3]) for i, dtype in enumerate(DTYPES)]


@BACKENDS
@SHAPE
def test_attribution(device, backend, shape):
    for dtype, layout in kinds(backend, shape):
        for masked in (False, True):
            check_attribution(shape, dtype, layout, masked, device, backend)


@BACKENDS
@SHAPE
def test_attribution_of_values_that_are_no_numbers(device, backend, shape):
    for dtype, layout in kinds(backend, shape):
        check_poisoned_attribution(shape, dtype, layout, device, backend)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_do_not_count_whatever_they_hold(device, backend, dtype):
    hidden = torch.randn(2, 7, 20, device=device).to(dtype)
    gradient = torch.ones_like(hidden)
    for position in range(7):
        broken = hidden.clone()
        broken[1, position, 13] = torch.nan
        for tensor in neuron_attribution(broken, gradient, backend=backend):
            assert tensor.isnan().nonzero().tolist() == [[1, 13]]
        mask = torch.ones(2, 7, dtype=torch.bool, device=device)
        mask[1, position] = False
        assert all(t.isfinite().all() for t in neuron_attribution(broken, gradient, mask, backend=backend))
    nothing = neuron_attribution(hidden, gradient, torch.zeros_like(mask), backend=backend)
    assert [tensor.unique().tolist() for tensor in nothing] == [[-torch.inf], [torch.inf], [0.0]]


@BACKENDS
@pytest.mark.parametrize("per_sample", [False, True])
@SHAPE
def test_penalty(device, backend, shape, per_sample):
    for dtype, layout in kinds(backend, shape):
        check_penalty(shape, dtype, layout, shape[1] % 2 == 0, device, backend, per_sample=per_sample)


@BACKENDS
@pytest.mark.parametrize("per_sample", [False, True])
@SHAPE
def test_penalty_of_whole_numbers_is_the_references(device, backend, shape, per_sample):
    for number, (dtype, layout) in enumerate(kinds(backend, shape)):
        for one_sided in (False, True) if backend == "cuda" else (number % 2 == 0,):
            for poisoned in (False, True):
                check_exact_penalty(
                    shape,
                    dtype,
                    layout,
                    device,
                    backend,
                    per_sample=per_sample,
                    one_sided=one_sided,
                    poisoned=poisoned,
                )


@BACKENDS
def test_the_penaltys_weight_may_stay_on_the_device(device, backend):
    hidden, gradient = torch.randn(2, 3, 17, 65, device=device)
    reference = torch.randn(65, device=device)
    runs = [
        neuron_penalty(hidden, gradient.clone(), reference, weight=weight, per_sample=False, backend=backend)
        for weight in (0.37, torch.tensor([0.37], device=device))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert runs[0].penalty > 0
