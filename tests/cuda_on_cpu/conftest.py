"""Builds the CUDA sources for the CPU (emulated.cpp) and puts them in the place of the CUDA backend."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
sys.path[:0] = [str(HERE.parent / "ops"), str(HERE.parent / "gpu")]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The module of csrc/cuda/bindings.cpp, running on the CPU."""
    import pybind11

    library = tmp_path_factory.mktemp("emulated") / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [HERE / "include", CSRC, CSRC / "include", CSRC / "cuda", pybind11.get_include()]
    includes.append(sysconfig.get_path("include"))
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
    # words are read as two halves, as on the device
    flags.append("-fno-strict-aliasing")
    command = ["g++", *flags, *(f"-I{folder}" for folder in includes), "-x", "c++", str(HERE / "emulated.cpp")]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    specification = importlib.util.spec_from_file_location("emulated", library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_on_cpu(emulated, monkeypatch):
    """backend="cuda" takes CPU tensors."""
    from ssiuu_fast.ops import addresses, backends

    both = {name: getattr(module, name) for module in (backends._C, emulated) for name in dir(module)}
    monkeypatch.setattr(backends, "_C", SimpleNamespace(**both))
    monkeypatch.setattr(backends, "_cuda_obstacle", lambda device: "")
    monkeypatch.setattr(addresses, "launch_place", lambda device: (0, 0))
    return emulated
