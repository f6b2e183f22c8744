"""Cases of the operators on weight gradients for benchmarks/gpu.py: linear modules of a Llama-3.2-3B.

They decide whether "auto" may take the fused kernel: it does where that is at least GOAL times as fast as two products
of the library and penalty_, at every shape.
"""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Part
from penalty import WEIGHT

from ssiuu_fast.ops import backends as available
from ssiuu_fast.ops import both_weight_gradients, penalized_weight_gradient, penalty_, weighted_weight_gradient

# outputs and inputs of up and down projection, attention and its keys
MODULES = ((8192, 3072), (3072, 8192), (3072, 3072), (1024, 3072))
# samples and tokens of a forget and a retain batch together: short answers, and long ones
BATCHES = ((16, 128), (32, 512))
TINY_MODULES = ((48, 32),)
TINY_BATCHES = ((4, 20),)
GOAL = 1.1
# elements whose terms cancel: there it tells that the library rounds an operand and g to bf16 (seen are 1 to 3 %)
CANCELLED = 0.06


class Tensors:
    """What a backward hook has at a module: the first half of the samples is to be forgotten."""

    def __init__(self, batch, module, device):
        samples, _ = batch
        outputs, inputs = module
        kind = {"dtype": torch.bfloat16, "device": device}
        self.gradient, self.input = torch.randn(*batch, outputs, **kind), torch.randn(*batch, inputs, **kind)
        self.weights = torch.rand(samples, device=device)
        self.rows = slice(0, samples // 2)
        self.weights[samples // 2 :] = 0
        self.parameter, self.reference = torch.randn(2, outputs, inputs, **kind)
        self.operands = self.gradient, self.input, self.weights

    @property
    def traffic(self):
        """Both operands, parameter and reference are read, reference and result written."""
        return self.gradient.nbytes + self.input.nbytes + 4 * self.parameter.nbytes

    def name(self):
        samples, tokens, outputs = self.gradient.shape
        flop = 2 * self.gradient.numel() * self.input.shape[2]
        return f"B, T = {samples, tokens}, W = {outputs, self.input.shape[2]} bf16, {flop / 1e9:.4g} GFLOP a product"


def _forms(backends):
    """Backends of these operators among those that are measured, beside the library."""
    return [name for name in backends if name == "reference" or name in available.KERNELS["both_weight_gradients"]]


def _penalized_case(batch, module, device, backends) -> Case:
    tensors = Tensors(batch, module, device)
    kept = tensors.reference.clone()

    def in_one(backend):
        return lambda: penalized_weight_gradient(
            *tensors.operands,
            tensors.parameter,
            tensors.reference,
            weight=WEIGHT,
            rows=tensors.rows,
            backend=backend,
        )

    def then_penalty(backend):
        def call():
            plain, g = both_weight_gradients(*tensors.operands, rows=tensors.rows, backend=backend)
            return plain, *penalty_([g], [tensors.parameter], [tensors.reference], out=[plain], weight=WEIGHT)

        return call

    def outcome(result):
        gradient, penalty, negative, *_ = result
        return [
            Part(gradient, 0.03, exceptions=CANCELLED),
            Part(tensors.reference, 0.03, exceptions=CANCELLED),
            Part(penalty, 1e-2),
            Part(negative, 1e-2),
        ]

    fused = _forms(backends)
    contestants = {"library": in_one("library")}
    contestants |= {f"{name}, then penalty_": then_penalty(name) for name in fused}
    contestants |= {name: in_one(name) for name in fused}
    # what a step without the penalty takes
    left, right = tensors.gradient.flatten(0, 1).T, tensors.input.flatten(0, 1)
    contestants["plain product"] = lambda: torch.mm(left, right)
    return Case(
        benchmark="penalized_weight_gradient",
        name=tensors.name(),
        contestants=contestants,
        restore=lambda: tensors.reference.copy_(kept),
        outcome=outcome,
        truth="library",
        unchecked=("plain product",),
        traffic=tensors.traffic,
        limit="copy",
        baselines=("library", "plain product"),
        goals={"library": GOAL},
        goals_of=tuple(fused),
    )


def _weighted_case(batch, module, device, backends) -> Case:
    tensors = Tensors(batch, module, device)

    def call(backend):
        return lambda: weighted_weight_gradient(*tensors.operands, rows=tensors.rows, backend=backend)

    fused = _forms(backends)
    return Case(
        benchmark="weighted_weight_gradient",
        name=f"{tensors.name()}, half of the samples",
        contestants={name: call(name) for name in ("library", *fused)},
        restore=lambda: None,
        outcome=lambda result: [Part(result, 0.03, exceptions=CANCELLED)],
        truth="library",
        traffic=(tensors.gradient.nbytes + tensors.input.nbytes) // 2 + tensors.parameter.nbytes,
        limit="copy",
        baselines=("library",),
        goals={"library": GOAL},
        goals_of=tuple(fused),
    )


def cases(device, backends, *, tiny: bool) -> Iterator:
    """Functions that make a case each, so that one's memory is free before the next."""
    for make in (_penalized_case, _weighted_case):
        for batch in TINY_BATCHES if tiny else BATCHES:
            for module in TINY_MODULES if tiny else MODULES:
                yield partial(make, batch, module, device, backends)
