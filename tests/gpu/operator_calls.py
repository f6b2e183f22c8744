"""One call of each operator as a pair of functions: make its tensors, run it on them; runs on the CPU too."""

from typing import NamedTuple

import torch
from penalty_cases import SINGLE

from ssiuu_fast.ops import (
    both_weight_gradients,
    neuron_attribution,
    neuron_penalty,
    penalized_weight_gradient,
    penalty_,
    weighted_weight_gradient,
)

SIZES = (100_003, 1, 65_536, 257, 4096, 300_007)


class Operator(NamedTuple):
    """make(device, seed) gives tensors; run(tensors, backend) gives all that it wrote and returned."""

    make: callable
    run: callable


def _penalty_tensors(device, seed):
    """Gradient, parameter, reference and out, one after the other for each index, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.tensor([0.37 + seed])]
    for i, size in enumerate(SIZES):
        dtypes = (SINGLE[i % 3], SINGLE[i // 2 % 3], SINGLE[i % 2], torch.float32)
        tensors += [torch.randn(size, generator=generator).to(dtype) for dtype in dtypes]
    return [tensor.to(device) for tensor in tensors]


def _penalty_with(weight_of):
    def run(tensors, backend):
        weight, *rest = tensors
        lists = [rest[role::4] for role in range(4)]
        # every other index is written in place
        lists[3] = [out if i % 2 else None for i, out in enumerate(lists[3])]
        result = penalty_(*lists[:3], out=lists[3], weight=weight_of(weight), backend=backend)
        return [*rest, *result]

    return run


def _neuron_tensors(device, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = torch.randn(2, 3, 517, 1031, generator=generator).to(torch.bfloat16)
    mask = torch.rand(3, 517, generator=generator) < 0.8
    reference = torch.randn(3, 1031, generator=generator)
    return [tensor.to(device) for tensor in (hidden, gradient, reference, mask)]


def _attribution(tensors, backend):
    hidden, gradient, _, mask = tensors
    return list(neuron_attribution(hidden, gradient, mask, backend=backend))


def _neuron_penalty_with(per_sample):
    def run(tensors, backend):
        hidden, gradient, reference, mask = tensors
        reference = reference if per_sample else reference[0]
        return list(
            neuron_penalty(hidden, gradient, reference, mask, weight=0.37, per_sample=per_sample, backend=backend)
        )

    return run


def _module_tensors(device, seed):
    """gradient, input, weights, parameter, reference and out; whole vectors of 16 bytes for an even seed."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = (272, 144) if seed % 2 == 0 else (271, 145)
    operands = [torch.randn(5, 67, size, generator=generator).to(torch.bfloat16) for size in (outputs, inputs)]
    weights = torch.randn(5, generator=generator)
    weights[0] = 0
    matrices = torch.randn(3, outputs, inputs, generator=generator).unbind()
    return [tensor.to(device) for tensor in (*operands, weights, *(matrix.clone() for matrix in matrices))]


def _weighted(tensors, backend):
    gradient, input, weights, *_, out = tensors
    return [weighted_weight_gradient(gradient, input, weights, rows=slice(1, None), out=out, backend=backend)]


def _both(tensors, backend):
    gradient, input, weights, *_, out = tensors
    return list(both_weight_gradients(gradient, input, weights, out=(out, None), backend=backend))


def _penalized(tensors, backend):
    gradient, input, weights, parameter, reference, out = tensors
    result = penalized_weight_gradient(
        gradient, input, weights, parameter, reference, weight=0.37, out=out, backend=backend
    )
    return [*result, reference]


OPERATORS = {
    "penalty_": Operator(_penalty_tensors, _penalty_with(lambda weight: 0.37)),
    "penalty_ with its weight on the device": Operator(_penalty_tensors, _penalty_with(lambda weight: weight)),
    "neuron_attribution": Operator(_neuron_tensors, _attribution),
    "neuron_penalty": Operator(_neuron_tensors, _neuron_penalty_with(False)),
    "neuron_penalty a sample": Operator(_neuron_tensors, _neuron_penalty_with(True)),
    "weighted_weight_gradient": Operator(_module_tensors, _weighted),
    "both_weight_gradients": Operator(_module_tensors, _both),
    "penalized_weight_gradient": Operator(_module_tensors, _penalized),
}
# of each operator with each of its backends for a GPU
CALLS = [(name, kind) for name in OPERATORS for kind in ("library" if "weight_gradient" in name else "cuda", "triton")]


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def bits(tensors):
    return [tensor.reshape(-1).view(torch.uint8).clone() for tensor in tensors]


def assert_same_bits(mine, theirs, what):
    for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(one, other), f"{what}: output {i} differs in {(one != other).sum().item()} bytes"


def check_determinism(operator, device, backend, runs, before=lambda: None):
    """The same bits in every run; `before` is called ahead of each."""
    tensors = OPERATORS[operator].make(device, 0)
    first = None
    for number in range(runs):
        fresh = clones(tensors)
        before()
        outcome = bits(OPERATORS[operator].run(fresh, backend))
        first = first or outcome
        assert_same_bits(outcome, first, f"{operator}, run {number}")
