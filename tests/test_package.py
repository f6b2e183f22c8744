"""What importing the package does and what its distribution holds."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

import ssiuu_fast


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light():
    loaded = run(
        "import sys, torch, ssiuu_fast, ssiuu_fast.ops\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ).split()
    assert "ssiuu_fast" in loaded
    assert not {"transformers", "triton", "datasets", "matplotlib"} & set(loaded)


def test_works_without_the_extension():
    run(
        "import sys\n"
        "sys.modules['ssiuu_fast._C'] = None\n"
        "import torch\n"
        "from ssiuu_fast.ops import penalty_\n"
        "g = torch.tensor([-1.0])\n"
        "penalty_([g], [torch.ones(1)], [torch.zeros(1)], weight=1.0)\n"
        "assert g.item() == 2.0"
    )


def test_version_comes_from_one_place():
    assert importlib.metadata.version("ssiuu-fast") == ssiuu_fast.__version__


def test_kernels_are_a_part_of_the_package():
    specification = importlib.util.find_spec("ssiuu_fast.kernels")
    assert specification is not None
    # a regular package named kernels would be taken for another project's
    assert specification.origin is None, "kernels/ must have no __init__.py"
    assert importlib.util.find_spec("ssiuu_fast.kernels.penalty") is not None


def test_the_base_install_depends_on_torch_alone():
    requirements = [r for r in importlib.metadata.requires("ssiuu-fast") if "extra ==" not in r]
    assert len(requirements) == 1 and requirements[0].startswith("torch")


@pytest.mark.parametrize("extra", ["unlearn", "test"])
def test_extras(extra):
    assert extra in importlib.metadata.metadata("ssiuu-fast").get_all("Provides-Extra")
