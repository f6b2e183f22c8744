"""Cases of neuron_attribution and neuron_penalty for benchmarks/gpu.py."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Part, compile_for
from penalty import WEIGHT

from ssiuu_fast.ops import neuron_attribution, neuron_penalty

# [batch, tokens, neurons]
SHAPES = ((16, 512, 8192), (4, 2048, 3072), (1, 32_768, 1024))
# what the goal of neuron_attribution is stated for
STATED = SHAPES[0]
TINY_SHAPES = ((2, 16, 64),)


def eager_attribution(hidden, gradient):
    product = hidden * gradient
    return product.amax(1), product.amin(1), product.sum(1)


def eager_attribution_fp32(hidden, gradient):
    product = hidden.float() * gradient.float()
    return product.amax(1), product.amin(1), product.sum(1)


def eager_penalty(hidden, gradient, reference):
    attribution = (hidden.float() * gradient.float()).sum((0, 1))
    difference = torch.where(attribution < 0, attribution - reference, 0)
    gradient.copy_(WEIGHT * 2 * difference * gradient)
    return gradient, attribution, difference.square().sum(), (attribution < 0).sum()


def _attribution_case(shape, device, backends) -> Case:
    hidden, gradient = torch.randn(2, *shape, dtype=torch.bfloat16, device=device)
    compiled = compile_for(device, eager_attribution_fp32, dynamic=False)

    def fused(backend):
        return lambda: neuron_attribution(hidden, gradient, backend=backend)

    return Case(
        benchmark="neuron_attribution",
        name=f"B, T, N = {shape} bf16",
        contestants={backend: fused(backend) for backend in backends}
        | {
            "eager bf16": lambda: eager_attribution(hidden, gradient),
            "eager fp32": lambda: eager_attribution_fp32(hidden, gradient),
            "compiled": lambda: compiled(hidden, gradient),
        },
        restore=lambda: None,
        outcome=lambda result: [Part(result[0], 1e-6), Part(result[1], 1e-6), Part(result[2], 1e-3)],
        truth="eager fp32",
        # its products are rounded to bf16
        unchecked=("eager bf16",),
        traffic=hidden.nbytes + gradient.nbytes,
        limit="read",
        baselines=("eager bf16", "eager fp32", "compiled"),
        goals={"limit": 0.9} if shape == STATED else {},
        goals_of=backends,
    )


def _penalty_case(shape, device, backends) -> Case:
    hidden, gradient = torch.randn(2, *shape, dtype=torch.bfloat16, device=device)
    reference = torch.randn(shape[2], device=device)
    kept = gradient.clone()
    compiled = compile_for(device, eager_penalty, dynamic=False)

    def fused(backend):
        return lambda: neuron_penalty(hidden, gradient, reference, weight=WEIGHT, per_sample=False, backend=backend)

    def outcome(result):
        injection, attribution, penalty, negative = result
        # the sign of an A near 0 depends on the order of its sum, and with it a whole neuron's injection
        return [
            Part(injection, 0.02, exceptions=2e-3),
            Part(attribution, 1e-3),
            Part(penalty, 1e-3),
            Part(negative, 2e-3),
        ]

    return Case(
        benchmark="neuron_penalty",
        name=f"B, T, N = {shape} bf16",
        contestants={backend: fused(backend) for backend in backends}
        | {
            "eager fp32": lambda: eager_penalty(hidden, gradient, reference),
            "compiled": lambda: compiled(hidden, gradient, reference),
        },
        restore=lambda: gradient.copy_(kept),
        outcome=outcome,
        truth="eager fp32",
        # the least there is: gradient is needed again once A is whole, and where it isn't in cache that is a third read
        traffic=hidden.nbytes + 2 * gradient.nbytes,
        limit="copy",
        baselines=("eager fp32", "compiled"),
        goals={},
        goals_of=(),
    )


def cases(device, backends, *, tiny: bool) -> Iterator:
    """Functions that make a case each, so that one's memory is free before the next."""
    for make in (_attribution_case, _penalty_case):
        for shape in TINY_SHAPES if tiny else SHAPES:
            yield partial(make, shape, device, backends)
