"""Which backends exist, which can run here, and why the others can't."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from typing import NamedTuple

import torch

try:
    from ssiuu_fast import _C
except ImportError as error:
    _C = None
    _cpp_reason = f"the C++ extension ssiuu_fast._C can't be imported: {error}"
else:
    _cpp_reason = ""

# auto tries them in this order; library is torch's own matrix products
BACKENDS = ("library", "cuda", "cpp", "triton", "reference")

# which backends have a form of an operator beside the reference, which serves every one
KERNELS = {
    "penalty_": ("cuda", "cpp", "triton"),
    "neuron_attribution": ("cuda", "cpp", "triton"),
    "neuron_penalty": ("cuda", "cpp", "triton"),
    "weighted_weight_gradient": ("library", "triton"),
    "both_weight_gradients": ("library", "triton"),
    "penalized_weight_gradient": ("library", "triton"),
}


class Availability(NamedTuple):
    """Whether a backend can run on this machine, and what it is or why it can't."""

    backend: str
    usable: bool
    reason: str


def availability() -> list[Availability]:
    """Return one row a backend: usable here or not, and what was built or what is missing.

    Starts CUDA to ask for its devices, so it is for `info`, not for import time.
    """
    return [
        Availability("reference", True, f"torch {torch.__version__}, every device"),
        Availability("library", True, f"torch {torch.__version__}, every device; for weight gradients"),
        _cpp_availability(),
        _cuda_availability(),
        _triton_availability(),
    ]


def choose(backend: str, operator: str, device: torch.device, *, double: bool = False) -> str:
    """Return the backend that runs `operator` on `device`; raise with the reason if the one asked for can't.

    double: the tensors are float64, which only "reference", "library" and "cpp" compute.
    """
    if backend == "auto":
        return next(name for name in BACKENDS if not _obstacle(name, operator, device, double))
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, not {backend!r}")
    obstacle = _obstacle(backend, operator, device, double)
    if obstacle:
        raise RuntimeError(
            f'{operator}: backend="{backend}" can\'t run: {obstacle}. backend="auto" takes one that can.'
        )
    return backend


def _obstacle(backend, operator, device, double):
    """Why `backend` can't run `operator` on `device`; empty if it can."""
    if backend == "reference":
        return ""
    if backend not in KERNELS[operator]:
        return f"there is no {backend} kernel of {operator} yet"
    if backend == "library":
        return ""
    if backend == "cpp":
        return _cpp_reason if device.type == "cpu" else f"it works on CPU tensors, these are on {device}"
    if double:
        return f"the {backend} kernel computes in float32, these tensors are float64"
    return _cuda_obstacle(device) if backend == "cuda" else _triton_obstacle(device)


def _cuda_obstacle(device):
    if device.type != "cuda":
        return f"it works on CUDA tensors, these are on {device}"
    if _C is None:
        return _cpp_reason
    if not _C.CUDA_BUILT:
        return f"built without CUDA ({_C.CUDA_BUILD})"
    return _device_obstacle(device.index or 0)


@functools.cache
def _device_obstacle(index):
    """Why this device, or its driver, can't run what was built; empty if it can."""
    # torch's guard puts its own current device back: both copies of the runtime share the thread's context
    with torch.cuda.device(index) if torch.cuda.is_available() else contextlib.nullcontext():
        reason = _C.cuda_obstacle(index)
    return f"{reason}; built for {_C.CUDA_BUILD}" if reason else ""


def _triton_obstacle(device):
    if device.type == "cpu":
        if not _triton_interpreted():
            return "Triton runs on CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before the start)"
    elif device.type != "cuda":
        return f"the triton kernel works on CUDA tensors, these are on {device}"
    return "" if _has_triton() else "the package triton isn't installed"


def _has_triton():
    return importlib.util.find_spec("triton") is not None


def _triton_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _cpp_availability():
    if _C is None:
        return Availability("cpp", False, _cpp_reason)
    units = ", ".join(_C.cpu_units())
    return Availability("cpp", True, f"instruction sets usable here: {units}; in use: {_C.cpu_unit()}")


def _cuda_availability():
    if _C is None:
        return Availability("cuda", False, _cpp_reason)
    if not _C.CUDA_BUILT:
        return Availability("cuda", False, f"built without CUDA ({_C.CUDA_BUILD})")
    devices, error = _C.cuda_devices()
    if not devices:
        return Availability("cuda", False, f"built for {_C.CUDA_BUILD}; no device: {error or 'none is visible'}")
    described = [
        f"{name}, compute capability {major}.{minor}" + (f" (not usable: {obstacle})" if obstacle else "")
        for (name, major, minor), obstacle in zip(devices, map(_device_obstacle, range(len(devices))), strict=True)
    ]
    usable = not all(map(_device_obstacle, range(len(devices))))
    return Availability("cuda", usable, f"built for {_C.CUDA_BUILD}; {'; '.join(described)}")


def _triton_availability():
    if not _has_triton():
        return Availability("triton", False, "the package triton isn't installed")
    version = importlib.metadata.version("triton")
    if _triton_interpreted():
        return Availability("triton", True, f"triton {version}, interpreted (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Availability("triton", False, f"triton {version} is installed, but torch sees no CUDA device")
    return Availability("triton", True, f"triton {version}")
