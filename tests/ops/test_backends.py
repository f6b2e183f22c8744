"""Which backend is chosen, and what is said where one can't be."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from ssiuu_fast.ops import availability, backends

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_cpp_reason", "the C++ extension ssiuu_fast._C can't be imported: no such file")


@pytest.fixture
def built_with_cuda(monkeypatch):
    """Returns a function that says what stands in the way of a device."""

    def say(obstacle):
        extension = SimpleNamespace(
            CUDA_BUILT=True,
            CUDA_BUILD="CUDA 13, architectures 90",
            cuda_devices=lambda: ([("A GPU", 9, 0)], ""),
            cuda_obstacle=lambda index: obstacle,
        )
        monkeypatch.setattr(backends, "_C", extension)
        backends._device_obstacle.cache_clear()

    yield say
    backends._device_obstacle.cache_clear()


def test_auto_takes_the_fastest_that_fits_the_device(monkeypatch, built_with_cuda):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    operators = [operator for operator, kernels in backends.KERNELS.items() if "library" not in kernels]
    for operator in operators:
        assert backends.choose("auto", operator, CPU) == "cpp"
    for operator in operators:
        monkeypatch.setattr(backends, "_has_triton", lambda: True)
        built_with_cuda("")
        assert backends.choose("auto", operator, CUDA) == "cuda"
        assert backends.choose("auto", operator, CUDA, double=True) == "reference"
        assert backends.choose("auto", operator, MPS) == "reference"
        built_with_cuda("the driver is too old")
        assert backends.choose("auto", operator, CUDA) == "triton"
        monkeypatch.setattr(backends, "_has_triton", lambda: False)
        assert backends.choose("auto", operator, CUDA) == "reference"


def test_auto_takes_the_librarys_products_on_every_device(monkeypatch, built_with_cuda):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    built_with_cuda("")
    operators = [operator for operator, kernels in backends.KERNELS.items() if "library" in kernels]
    assert len(operators) == 3
    for operator, device, double in itertools.product(operators, (CPU, CUDA, MPS), (False, True)):
        assert backends.choose("auto", operator, device, double=double) == "library"
    with pytest.raises(RuntimeError, match="there is no library kernel of penalty_ yet"):
        backends.choose("library", "penalty_", CPU)


def cuda_row():
    return next(row for row in availability() if row.backend == "cuda")


def test_what_stands_in_the_way_of_a_device_is_said(built_with_cuda):
    built_with_cuda("no kernel image is available")
    with pytest.raises(RuntimeError, match="can't run: no kernel image is available; built for CUDA 13, arch.* 90"):
        backends.choose("cuda", "penalty_", CUDA)
    with pytest.raises(RuntimeError, match="works on CUDA tensors, these are on cpu"):
        backends.choose("cuda", "penalty_", CPU)
    with pytest.raises(RuntimeError, match="the cuda kernel computes in float32"):
        backends.choose("cuda", "penalty_", CUDA, double=True)


def test_the_cuda_row_in_each_case(monkeypatch):
    def row(**what):
        extension = {"CUDA_BUILT": True, "CUDA_BUILD": "CUDA 13", "cuda_obstacle": lambda index: "", "cpu_unit": str}
        monkeypatch.setattr(backends, "_C", SimpleNamespace(cpu_units=list, **(extension | what)))
        backends._device_obstacle.cache_clear()
        found = cuda_row()
        backends._device_obstacle.cache_clear()
        return found

    assert row(CUDA_BUILT=False, CUDA_BUILD="SSIUU_CUDA=OFF")[1:] == (False, "built without CUDA (SSIUU_CUDA=OFF)")
    no_driver = row(cuda_devices=lambda: ([], "driver version is insufficient (error 35)"))
    assert no_driver[1:] == (False, "built for CUDA 13; no device: driver version is insufficient (error 35)")
    assert row(cuda_devices=lambda: ([("A GPU", 9, 0)], ""))[1:] == (
        True,
        "built for CUDA 13; A GPU, compute capability 9.0",
    )
    old = row(cuda_devices=lambda: ([("Old", 7, 5)], ""), cuda_obstacle=lambda index: "no image")
    assert not old.usable and "Old, compute capability 7.5 (not usable: no image" in old.reason


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


def test_an_unknown_instruction_set_is_refused():
    from ssiuu_fast import _C

    with pytest.raises(ValueError, match="sse9"):
        _C.use_cpu_unit("sse9")
    assert _C.cpu_units()[0] == "baseline"


def test_this_build_loads_and_answers_without_a_driver():
    from ssiuu_fast import _C

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    devices, error = _C.cuda_devices()
    assert devices == [] and error
    row = cuda_row()
    assert not row.usable and _C.CUDA_BUILD in row.reason
    assert ("no device" in row.reason) == _C.CUDA_BUILT
