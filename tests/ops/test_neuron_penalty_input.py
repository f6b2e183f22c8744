"""neuron_penalty refuses bad input with what is wrong, before anything has changed."""

import pytest
import torch
from neuron_cases import BACKENDS

from ssiuu_fast.ops import neuron_penalty

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def arguments(**changes):
    generator = torch.Generator().manual_seed(0)
    good = {
        "hidden": torch.randn(2, 3, 4, generator=generator),
        "gradient": torch.randn(2, 3, 4, generator=generator),
        "reference": torch.zeros(2, 4),
        "mask": None,
        "weight": 1.0,
        "per_sample": True,
    }
    return good | changes


def shared():
    memory = torch.randn(100)
    return {"gradient": memory[:24].view(2, 3, 4), "hidden": memory[20:44].view(2, 3, 4)}


def shared_reference():
    memory = torch.randn(100)
    return {"gradient": memory[:24].view(2, 3, 4), "reference": memory[20:28].view(2, 4)}


def shared_weight():
    memory = torch.randn(24)
    return {"gradient": memory.view(2, 3, 4), "weight": memory[3]}


BAD = [
    ({"hidden": torch.randn(3, 4)}, ValueError, r"hidden has shape \(3, 4\)"),
    ({"gradient": torch.randn(2, 2, 4)}, ValueError, "they must agree"),
    ({"gradient": torch.randn(2, 3, 4).double()}, ValueError, "gradient is torch.float64"),
    ({"gradient": torch.randn(2, 4, 3).transpose(1, 2)}, ValueError, r"gradient has strides .*contiguous"),
    ({"gradient": torch.randn(2, 3, 4, requires_grad=True)}, ValueError, "gradient requires grad"),
    ({"gradient": torch.randn(4).expand(2, 3, 4)}, ValueError, "elements may share memory"),
    ({"gradient": torch.randn(3, 4).expand(2, 3, 4)}, ValueError, "elements may share memory"),
    ({"gradient": torch.randn(20).as_strided((2, 3, 4), (4, 3, 1))}, ValueError, "elements may share memory"),
    (shared(), ValueError, "gradient and hidden share memory"),
    (shared_reference(), ValueError, "gradient and reference share memory"),
    (shared_weight(), ValueError, "gradient and weight share memory"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask is torch.float32"),
    ({"mask": [[1, 1, 1]] * 2}, TypeError, "mask must be a tensor or None, not list"),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"mask is \(3, 2\)"),
    ({"reference": torch.zeros(4)}, ValueError, r"reference is \(4,\).*per_sample=True it must be \(2, 4\)"),
    ({"per_sample": False}, ValueError, r"per_sample=False it must be \(4,\)"),
    ({"reference": torch.zeros(2, 4).double()}, TypeError, "reference is torch.float64: convert"),
    ({"reference": torch.zeros(4, 2).T}, ValueError, "reference of shape .* has strides"),
    ({"reference": [0.0]}, TypeError, "reference must be a tensor, not list"),
    ({"weight": float("nan")}, ValueError, "weight must be finite, not nan"),
    ({"weight": torch.tensor(float("inf"))}, ValueError, "weight must be finite, not inf"),
    ({"weight": torch.ones(2)}, ValueError, r"weight is torch.float32 of shape \(2,\)"),
    ({"weight": torch.tensor(1.0).double()}, ValueError, "weight is torch.float64"),
]


@EACH_BACKEND
@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input(backend, changes, error, message):
    given = arguments(**changes)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in given.values()]
    with pytest.raises(error, match=message):
        neuron_penalty(**given, backend=backend)
    for value, kept in zip(given.values(), before, strict=True):
        assert torch.equal(value, kept) if isinstance(value, torch.Tensor) else value == kept or value != value


@EACH_BACKEND
def test_dimensions_of_one_element_may_have_any_stride(backend):
    gradient = torch.ones(1, 4).as_strided((1, 1, 4), (0, 0, 1))
    options = {"weight": 0.5, "per_sample": False, "backend": backend}
    result = neuron_penalty(-torch.ones(1, 1, 4), gradient, torch.zeros(4), **options)
    # A = d = −1
    assert result.injection.tolist() == [[[-1] * 4]]
    column = torch.ones(2, 3).as_strided((2, 3, 1), (3, 1, 0))
    result = neuron_penalty(-torch.ones(2, 3, 1), column, torch.zeros(1), **options)
    assert result.injection.flatten().tolist() == [-6] * 6
