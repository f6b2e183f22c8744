"""Which backend is chosen, and what is said where one can't be."""

import pytest
import torch

from ssiuu_fast.ops import availability, backends

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_cpp_reason", "the C++ extension ssiuu_fast._C can't be imported: no such file")


def test_auto_takes_the_fastest_that_fits_the_device(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    assert backends.choose("auto", "penalty_", CPU) == "cpp"
    assert backends.choose("auto", "penalty_", CUDA) == "triton"
    assert backends.choose("auto", "penalty_", CUDA, double=True) == "reference"
    for operator in ("neuron_attribution", "neuron_penalty"):
        assert backends.choose("auto", operator, CPU) == "cpp"
        assert backends.choose("auto", operator, CUDA) == "triton"
        assert backends.choose("auto", operator, CUDA, double=True) == "reference"
    assert backends.choose("auto", "penalty_", MPS) == "reference"
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert backends.choose("auto", "penalty_", CUDA) == "reference"


def test_without_the_extension(without_extension):
    assert backends.choose("auto", "penalty_", CPU) == "reference"
    with pytest.raises(RuntimeError, match="can't be imported: no such file"):
        backends.choose("cpp", "penalty_", CPU)
    rows = {row.backend: row for row in availability()}
    assert not rows["cpp"].usable and "can't be imported" in rows["cpp"].reason
    assert rows["reference"].usable


def test_an_explicit_backend_on_the_wrong_device_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="works on CPU tensors, these are on cuda"):
        backends.choose("cpp", "penalty_", CUDA)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends.choose("triton", "penalty_", CPU)
    with pytest.raises(RuntimeError, match="these are on mps"):
        backends.choose("triton", "penalty_", MPS)


def test_an_operator_without_a_kernel_says_so(monkeypatch):
    monkeypatch.setitem(backends.KERNELS, "penalty_", ("cpp",))
    assert backends.choose("auto", "penalty_", CUDA) == "reference"
    with pytest.raises(RuntimeError, match="no triton kernel of penalty_"):
        backends.choose("triton", "penalty_", CUDA)


def test_every_backend_is_reported_with_a_reason():
    rows = availability()
    assert {row.backend for row in rows} == set(backends.BACKENDS)
    assert all(row.reason for row in rows)
    cuda = next(row for row in rows if row.backend == "cuda")
    assert not cuda.usable and "no CUDA kernels yet" in cuda.reason


def test_an_unknown_instruction_set_is_refused():
    from ssiuu_fast import _C

    with pytest.raises(ValueError, match="sse9"):
        _C.use_cpu_unit("sse9")
    assert _C.cpu_units()[0] == "baseline"
