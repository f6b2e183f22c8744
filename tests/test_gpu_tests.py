"""The tests for a GPU, as far as they can be run without one: they are found, and their checks pass on the CPU."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "ops"))
sys.path.insert(0, str(TESTS / "gpu"))

import neuron_grid  # noqa: E402
import penalty_grid  # noqa: E402
import small_grid  # noqa: E402
import test_gpu_large  # noqa: E402
import test_gpu_offload  # noqa: E402
import test_gpu_sanitizer  # noqa: E402
import test_gpu_weight_gradients  # noqa: E402
import weight_gradient_cases  # noqa: E402
from operator_calls import OPERATORS, check_determinism  # noqa: E402

from ssiuu_fast import host_references  # noqa: E402
from ssiuu_fast.copy_lanes import WaitingLanes  # noqa: E402

CPU = torch.device("cpu")
# "auto" is C++ where it has a kernel
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])
SHAPES = [(3, 0, 17), (1, 1, 1), (2, 5, 67), (3, 31, 129), (1, 1030, 3)]
COLLECT = """
import sys, pytest, torch

def refuse(*arguments, **options):
    raise AssertionError("collecting the tests asked for a CUDA device")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch.cuda.current_device = refuse
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_they_are_collected_without_looking_for_a_device():
    run = subprocess.run([sys.executable, "-c", COLLECT, str(TESTS)], capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {line.partition("::")[0] for line in run.stdout.splitlines() if "::" in line}
    assert {Path(name).name for name in found} == {path.name for path in (TESTS / "gpu").glob("test_*.py")}


def test_they_are_skipped_with_the_reason_where_there_is_no_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    one = str(TESTS / "gpu" / "test_gpu_sanitizer.py")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", one]
    run = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0 and "3 skipped" in run.stdout, run.stdout + run.stderr
    assert "torch.cuda finds no CUDA device here" in run.stdout


def test_a_command_that_is_watched(tmp_path):
    print_and = "import sys; print('said', flush=True); print('complained', file=sys.stderr, flush=True); "
    for then, seconds, expected in (("sys.exit(9)", 60, 9), ("import time; time.sleep(600)", 3, None)):
        command = [sys.executable, "-c", print_and + then]
        # as compute-sanitizer does: what is watched is started by what is waited for
        outer = [sys.executable, "-c", f"import subprocess, sys; sys.exit(subprocess.call({command!r}))"]
        start = time.monotonic()
        status, said = test_gpu_sanitizer.watched(outer, tmp_path / "said.txt", seconds)
        assert status == expected and said.splitlines() == ["said", "complained"]
        assert time.monotonic() - start < 60


@BACKENDS
def test_the_grid_of_penalty(backend):
    for number, options in enumerate(penalty_grid.OPTIONS):
        case = penalty_grid.case_of(penalty_grid.COMBINATIONS, options, number)
        penalty_grid.check(case, CPU, backend, number % 3, f"options {options}")
    for seed in range(30):
        penalty_grid.check(penalty_grid.random_call(seed), CPU, backend, seed % 3, f"case {seed}")
        penalty_grid.check_poisoned(penalty_grid.random_call(seed, poison=True), CPU, backend, seed % 3, f"case {seed}")


@BACKENDS
def test_the_grid_that_triton_gets(backend):
    met = [set(), set()]
    for number, options in enumerate(penalty_grid.OPTIONS):
        combinations = penalty_grid.covering(number)
        assert len(combinations) == 6 and set(combinations) <= set(penalty_grid.COMBINATIONS)
        assert [len(set(role)) for role in zip(*combinations, strict=True)] == [3, 3, 4, 3]
        met[number % 2] |= {pair for row in combinations for pair in itertools.combinations(enumerate(row), 2)}
        case = penalty_grid.case_of(combinations, options, number)
        penalty_grid.check(case, CPU, backend, number % 3, f"options {options}")
    # of four roles with 3, 3, 4 and 3 dtypes every two
    assert len(met[0] | met[1]) == 3 * 3 * 3 + 3 * 3 * 4
    for seed in range(30):
        penalty_grid.check(penalty_grid.covered_call(seed), CPU, backend, seed % 3, f"case {seed}")
        poisoned = penalty_grid.covered_call(seed, poison=True)
        penalty_grid.check_poisoned(poisoned, CPU, backend, seed % 3, f"poisoned case {seed}")


def test_the_grid_finds_what_is_wrong():
    def run_with(change):
        case = penalty_grid.case_of(penalty_grid.COMBINATIONS, penalty_grid.OPTIONS[2], 0)
        mine = penalty_grid.placed(case, CPU, penalty_grid.ODD)
        theirs = penalty_grid.placed(case, CPU, penalty_grid.ODD)
        change(mine)
        penalty_grid.assert_same_outcome(mine, theirs, "changed")
        penalty_grid.assert_untouched(mine, theirs, "changed")

    run_with(lambda case: None)
    with pytest.raises(AssertionError, match="value of changed, index 50"):
        run_with(lambda case: penalty_grid.written(case)[50][-1:].add_(1))
    with pytest.raises(AssertionError, match="reference of changed, index 13"):
        run_with(lambda case: penalty_grid.parts(case.references[13])[0][:1].add_(1))
    with pytest.raises(AssertionError, match="memory outside the tensor was written"):
        run_with(lambda case: case.gradients[7]._base[0].add_(1))


@BACKENDS
def test_the_grid_of_neurons(backend):
    for number, shape in enumerate(SHAPES):
        for dtype in neuron_grid.DTYPES:
            layout = neuron_grid.LAYOUTS[number % 3]
            neuron_grid.check_attribution(shape, dtype, layout, number % 2 == 0, CPU, backend)
            neuron_grid.check_poisoned_attribution(shape, dtype, layout, CPU, backend)
            for per_sample in (False, True):
                how = {"per_sample": per_sample}
                neuron_grid.check_penalty(shape, dtype, layout, number % 2 == 0, CPU, backend, **how)
                for poisoned in (False, True):
                    how |= {"one_sided": not per_sample, "poisoned": poisoned}
                    neuron_grid.check_exact_penalty(shape, dtype, layout, CPU, backend, **how)


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_the_grid_of_weight_gradients(backend):
    for name, case, number in test_gpu_weight_gradients.cases(CPU, weight_gradient_cases.SHAPES, 1):
        for check in ("check_weighted", "check_both", "check_penalized"):
            getattr(weight_gradient_cases, check)(name, case, number, backend)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_calls_give_the_same_bits(operator):
    check_determinism(operator, CPU, "auto", 2)


def test_the_grid_for_a_memory_checker():
    small_grid.main(CPU, "auto")


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_large_tensors_slice_by_slice(kind, monkeypatch):
    monkeypatch.setattr(test_gpu_large, "skip_unless_free", lambda gigabytes: None)
    small = {"ELEMENTS": 2**15 + 4099, "SLICE": 2**13, "SHAPE": (3, 50, 1024), "MATRIX": (37, 48), "ROWS": 8}
    for name, value in small.items():
        monkeypatch.setattr(test_gpu_large, name, value)
    test_gpu_large.test_penalty_of_more_than_2_to_the_31_elements(CPU, "auto", kind)
    if kind == "bf16":
        test_gpu_large.test_neuron_attribution_of_more_than_2_to_the_31_elements(CPU, "auto")
        test_gpu_large.test_neuron_penalty_of_more_than_2_to_the_31_elements(CPU, "auto")
        # the library rounds what isn't written elsewhere
        test_gpu_large.test_weight_gradients_of_operands_of_more_than_2_to_the_31_elements(CPU, "reference")
        test_gpu_large.test_weight_gradients_of_more_than_2_to_the_31_elements(CPU, "reference")


@pytest.mark.parametrize("one_backward", [True, False])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_references_in_host_memory(one_backward, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(test_gpu_offload, "SIZES", sizes)
    monkeypatch.setattr(host_references, "lanes_of", WaitingLanes)
    test_gpu_offload.test_the_same_bits(CPU, one_backward, "8bit", 1, 2, monkeypatch, None)
    test_gpu_offload.test_initial_references(CPU, one_backward, None)
