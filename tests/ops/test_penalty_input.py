"""Bad input to penalty_: refused with the index and the remedy, before anything has changed."""

import pytest
import torch

from ssiuu_fast.ops import penalty_


def call():
    """A good call on two tensors, to be spoilt."""
    generator = torch.Generator().manual_seed(0)

    def tensors():
        return [torch.randn(4, 3, generator=generator) for _ in range(2)]

    return {"gradients": tensors(), "parameters": tensors(), "references": tensors(), "weight": 1.0, "out": tensors()}


def refused(arguments, error, *words, backend="reference"):
    tensors = {
        (name, i): tensor
        for name in ("gradients", "parameters", "references", "out")
        for i, tensor in enumerate(arguments[name] or [])
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type != "meta"
    }
    before = {key: (tensor.detach().clone(), tensor._version) for key, tensor in tensors.items()}
    with pytest.raises(error) as caught:
        penalty_(**arguments, backend=backend)
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
    for key, (values, version) in before.items():
        assert torch.equal(tensors[key].detach(), values) and tensors[key]._version == version, f"{key} has changed"


@pytest.mark.parametrize("name", ["parameters", "references", "out"])
def test_mismatched_list_lengths(name):
    arguments = call()
    arguments[name] = arguments[name][:1]
    refused(arguments, ValueError, f"{name} has 1 entries and gradients 2")


@pytest.mark.parametrize("name", ["parameters", "references", "out"])
def test_mismatched_shapes(name):
    arguments = call()
    arguments[name][1] = arguments[name][1].reshape(3, 4)
    refused(arguments, ValueError, f"{name}[1]", "(3, 4)", "(4, 3)")


@pytest.mark.parametrize("name", ["parameters", "references", "out"])
def test_mismatched_devices(name):
    arguments = call()
    arguments[name][1] = arguments[name][1].to("meta")
    refused(arguments, ValueError, f"{name}[1]", "meta", "cpu")


@pytest.mark.parametrize("name", ["gradients", "parameters", "references", "out"])
def test_not_a_tensor(name):
    arguments = call()
    arguments[name][1] = 3.0
    refused(arguments, TypeError, f"{name}[1]", "float")


@pytest.mark.parametrize("name", ["gradients", "parameters", "references", "out"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_unsupported_dtypes(name, dtype):
    arguments = call()
    arguments[name][1] = arguments[name][1].to(dtype)
    refused(arguments, TypeError, f"{name}[1]", str(dtype))


@pytest.mark.parametrize("name", ["gradients", "parameters", "references", "out"])
def test_float64_beside_others(name):
    arguments = call()
    arguments[name][1] = arguments[name][1].double()
    refused(arguments, TypeError, "[1]")


def test_out_of_a_third_dtype():
    arguments = call()
    arguments["out"][0] = arguments["out"][0].bfloat16()
    refused(arguments, TypeError, "out[0]", "bfloat16")


@pytest.mark.parametrize("name", ["gradients", "parameters", "references", "out"])
def test_not_contiguous(name):
    arguments = call()
    arguments[name][1] = arguments[name][1].reshape(3, 4).T
    refused(arguments, ValueError, f"{name}[1]", ".contiguous()")


@pytest.mark.parametrize("name", ["gradients", "parameters", "references", "out"])
def test_sparse(name):
    arguments = call()
    arguments[name][1] = arguments[name][1].to_sparse()
    refused(arguments, ValueError, f"{name}[1]", "torch.sparse_coo", ".to_dense()")


@pytest.mark.parametrize("name", ["out", "references"])
def test_written_tensors_that_require_grad(name):
    arguments = call()
    arguments[name][1].requires_grad_()
    refused(arguments, ValueError, f"{name}[1]", "requires grad", ".detach()")


def test_gradients_that_require_grad_only_where_overwritten():
    arguments = call()
    arguments["gradients"][0].requires_grad_()
    penalty_(**arguments)
    arguments["out"][0] = None
    refused(arguments, ValueError, "gradients[0]", "requires grad")


OVERLAPS = [("out", name) for name in ("gradients", "parameters", "references", "out")]
OVERLAPS += [("references", name) for name in ("gradients", "parameters", "references")]


@pytest.mark.parametrize(("written", "other"), OVERLAPS)
@pytest.mark.parametrize("shift", [-11, 0, 11])
def test_overlap(written, other, shift):
    arguments = call()
    memory = torch.randn(50)
    arguments[written][0] = memory[12:24].view(4, 3)
    arguments[other][1] = memory[12 + shift : 24 + shift].view(4, 3)
    refused(arguments, ValueError, f"{written}[0]", f"{other}[1]", ".clone()")


def test_overlap_of_what_is_overwritten_without_out():
    arguments = call() | {"out": None}
    arguments["gradients"][1] = arguments["parameters"][0]
    refused(arguments, ValueError, "gradients[1]", "parameters[0]", ".clone()")


def test_overlap_behind_a_longer_tensor():
    memory = torch.randn(1000)
    arguments = call() | {"out": None}
    arguments["parameters"] = [memory[:100], memory[100:110]]
    arguments["gradients"] = [torch.randn(100), torch.randn(10)]
    arguments["references"] = [torch.randn(100), memory[90:100]]
    refused(arguments, ValueError, "references[1]", "parameters[0]")


def test_neighbours_and_shared_reading_are_no_overlap():
    memory = torch.randn(7, 12)
    rows = [row.view(4, 3) for row in memory]
    gradient = torch.randn(4, 3)
    # one parameter and one gradient twice, only read; everything written lies side by side
    penalty_(
        [gradient, gradient], [rows[0], rows[0]], [rows[1], rows[2]], weight=1.0, out=[rows[3], rows[4]], backend="auto"
    )
    # references that aren't written may be shared
    penalty_(rows[3:5], rows[5:7], [rows[1], rows[1]], weight=1.0, update_references=False)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), torch.tensor([float("nan")])])
def test_weight_that_is_not_finite(weight):
    refused(call() | {"weight": weight}, ValueError, "weight", "finite")


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(1, dtype=torch.float64)])
def test_weight_of_wrong_shape_or_dtype(weight):
    refused(call() | {"weight": weight}, ValueError, "weight", "one float32 element")


def test_weight_on_another_device():
    refused(call() | {"weight": torch.ones(1, device="meta")}, ValueError, "weight is on meta")


def test_gradient_scale_that_is_not_finite():
    refused(call() | {"gradient_scale": float("inf")}, ValueError, "gradient_scale", "inf")


@pytest.mark.parametrize("counts", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_counts_of_wrong_shape_or_dtype(counts):
    refused(call() | {"nonfinite_counts": counts}, ValueError, "nonfinite_counts", "int64 (2,)")


def test_unknown_backend():
    refused(call(), ValueError, "'fast'", backend="fast")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_backend_that_cannot_run_says_why(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(call(), RuntimeError, backend, backend=backend)
