"""The CUDA operators over odd sizes and unaligned memory, for a memory checker to watch.

    compute-sanitizer --tool memcheck python tests/gpu/small_grid.py

What is expected is computed on the CPU, so that the kernels watched are the operators' own.
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests / "ops")]

from neuron_grid import NAMES, embedded, whole_numbers
from penalty_grid import (
    ALIGNED,
    COMBINATIONS,
    MIXED,
    ODD,
    OPTIONS,
    assert_same_outcome,
    case_of,
    check_guards,
    placed,
    run,
)

from ssiuu_fast.ops import neuron_attribution, neuron_penalty

SHAPES = [(1, 1, 1), (2, 3, 67), (3, 33, 129), (1, 1030, 5), (2, 0, 7)]
LARGER = (0, 1, 3, 17, 257, 1009, 70_001)


def check_penalty(device, backend):
    for number, options in enumerate(OPTIONS):
        for layout in (ODD, MIXED):
            case = case_of(COMBINATIONS[number::7], options, number, sizes=LARGER)
            mine, theirs = placed(case, device, layout), placed(case, "cpu", ALIGNED)
            run(mine, backend, f"options {options}")
            run(theirs, "reference", f"options {options}")
            assert_same_outcome(placed(mine, "cpu", ALIGNED), theirs, f"options {options}")
            for tensor in (*mine.gradients, *mine.parameters):
                check_guards(tensor, f"options {options}")


def check_neurons(device, backend):
    for shape in SHAPES:
        for layout in ("contiguous", "token-major"):
            generator = torch.Generator().manual_seed(sum(shape))
            values = [whole_numbers(shape, torch.bfloat16, "cpu", generator) for _ in range(2)]
            mask = torch.rand(shape[:2], generator=generator) < 0.7
            reference = torch.randint(-9, 9, (shape[2],), generator=generator).float()
            outcomes = []
            for place, name in ((device, backend), ("cpu", "reference")):
                (_, hidden), (_, gradient) = (embedded(tensor.to(place), layout) for tensor in values)
                counted = mask.to(place)
                attribution = neuron_attribution(hidden, gradient, counted, backend=name)
                penalty = neuron_penalty(
                    hidden, gradient, reference.to(place), counted, weight=0.5, per_sample=False, backend=name
                )
                outcomes.append([t.cpu() for t in (*attribution, *penalty)])
            names = (*NAMES, "injection", "attribution", "penalty", "negative")
            for mine, theirs, name in zip(*outcomes, names, strict=True):
                assert torch.equal(mine, theirs), f"{name} of {shape}, {layout}"


def main(device="cuda", backend="cuda"):
    check_penalty(device, backend)
    check_neurons(device, backend)


if __name__ == "__main__":
    main()
