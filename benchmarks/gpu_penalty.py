"""Cases of penalty_ for benchmarks/gpu.py: the linear weights of a Llama-3.2-3B, shards of them, small tensors."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from case import Case, Part, compile_for
from penalty import WEIGHT, transcription
from torch import Tensor

from ssiuu_fast import ops
from ssiuu_fast.ops import penalty_
from ssiuu_fast.ops.blockwise8 import tensors_of

REFERENCES = ("bf16", "8-bit", "fp32")
GOALS = {"limit": 0.9, "eager": 8.0, "compiled": 1.0}
# about 1e-13; a power of two, by which nothing is rounded
TINY = 2.0**-43
GOALS_SMALL = {"compiled": 2.0}


def model_shapes(layers=28, hidden=3072, heads=24, key_value_heads=8, head_dim=128, ffn=8192) -> list[tuple[int, int]]:
    """Weights of the linear modules inside the blocks of a Llama; by default those of Llama-3.2-3B."""
    queries, keys = heads * head_dim, key_value_heads * head_dim
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return layers * (attention + [(ffn, hidden), (ffn, hidden), (hidden, ffn)])


def small_shapes(count=3000) -> list[tuple[int]]:
    """Between 64 and 4096 elements."""
    sizes = torch.randint(64, 4097, (count,), generator=torch.Generator().manual_seed(0))
    return [(int(size),) for size in sizes]


@dataclass
class Buffers:
    """The tensors of one call; `references` are tensors or ops.Blockwise8."""

    gradients: list[Tensor]
    parameters: list[Tensor]
    references: list

    @property
    def eight_bit(self) -> bool:
        return not isinstance(self.references[0], Tensor)

    def reference_tensors(self) -> list[Tensor]:
        """The memory of the references."""
        return [tensor for reference in self.references for tensor in tensors_of(reference)]


def random_buffers(shapes, kind, device) -> Buffers:
    def normal():
        return [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes]

    gradients, parameters = normal(), normal()
    if kind == "fp32":
        references = [torch.randn(shape, device=device) for shape in shapes]
    else:
        references = normal()
    if kind == "8-bit":
        references = [ops.Blockwise8.encode(reference) for reference in references]
    return Buffers(gradients, parameters, references)


def shard_buffers(shapes, kind, device) -> Buffers:
    """Views into one memory a role, each from an odd element on, as shards of one group of FSDP2 may be."""
    assert kind == "bf16", "shards are of one dtype"
    sizes = [math.prod(shape) for shape in shapes]
    starts = list(itertools.accumulate((size + 2 - size % 2 for size in sizes), initial=1))

    def normal():
        memory = torch.randn(starts[-1], dtype=torch.bfloat16, device=device)
        return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    return Buffers(normal(), normal(), normal())


def tiny_buffers(shapes, kind, device) -> Buffers:
    """As they are where the probability of the forget set is small, which is where unlearning leads."""
    buffers = random_buffers(shapes, kind, device)
    torch._foreach_mul_(buffers.gradients + buffers.references, TINY)
    return buffers


def eager(buffers: Buffers, one=transcription):
    """The transcription of benchmarks/penalty.py, a tensor at a time."""
    rows = zip(buffers.gradients, buffers.parameters, buffers.references, strict=True)
    return _totals([one(gradient, parameter, *tensors_of(reference)) for gradient, parameter, reference in rows])


def _totals(sums):
    penalties, negatives = zip(*sums, strict=True)
    return torch.stack(penalties).sum(), torch.stack(negatives).sum()


def foreach(buffers: Buffers):
    """The formula in torch._foreach operators: few launches, all tensors in fp32 at a time."""
    attributions = [torch.empty_like(g, dtype=torch.float32) for g in buffers.gradients]
    torch._foreach_copy_(attributions, buffers.gradients)
    parameters = [torch.empty_like(p, dtype=torch.float32) for p in buffers.parameters]
    torch._foreach_copy_(parameters, buffers.parameters)
    torch._foreach_mul_(attributions, parameters)
    # 1 where A < 0, else 0
    negative = torch._foreach_sign(attributions)
    torch._foreach_neg_(negative)
    torch._foreach_clamp_min_(negative, 0.0)
    differences = parameters
    torch._foreach_copy_(differences, buffers.references)
    torch._foreach_neg_(differences)
    torch._foreach_add_(differences, attributions)
    torch._foreach_mul_(differences, negative)
    penalty = torch.stack(torch._foreach_norm(differences, 2)).square().sum()
    negatives = torch.stack(torch._foreach_norm(negative, 1)).sum()
    torch._foreach_copy_(buffers.references, attributions)
    torch._foreach_copy_(attributions, buffers.gradients)
    torch._foreach_mul_(differences, attributions)
    torch._foreach_mul_(differences, 2 * WEIGHT)
    torch._foreach_copy_(buffers.gradients, differences)
    return penalty, negatives


def _contestants(buffers, backends, compiled):
    def fused(backend):
        def call():
            result = penalty_(buffers.gradients, buffers.parameters, buffers.references, weight=WEIGHT, backend=backend)
            return result.penalty, result.negative

        return call

    calls = {backend: fused(backend) for backend in backends}
    if buffers.eight_bit:
        return calls | {"eager": lambda: eager(buffers), "foreach": None, "compiled": None}
    return calls | {
        "eager": lambda: eager(buffers),
        "foreach": lambda: foreach(buffers),
        "compiled": lambda: eager(buffers, compiled),
    }


def _case(name, shapes, kind, device, backends, *, goals, by_call=False, make=random_buffers, unit=1.0) -> Case:
    """`unit`: the size of attributions, by which outcomes are divided before they are compared."""
    # a kernel for each of the few shapes of a model; small tensors share one that takes any size
    compiled = compile_for(device, transcription, dynamic=by_call)
    buffers = make(shapes, kind, device)
    written = buffers.gradients + buffers.reference_tensors()
    kept = [tensor.clone() for tensor in written]

    def restore():
        torch._foreach_copy_(written, kept)

    def outcome(result):
        penalty, negative = result
        references = buffers.references
        if buffers.eight_bit:
            # the next code may be chosen where two are equally near
            parts = [Part(reference.decode(), 0.05) for reference in references]
        else:
            parts = [Part(_over(reference, unit), _tolerance(reference)) for reference in references]
        parts += [Part(_over(gradient, unit**2), _tolerance(gradient)) for gradient in buffers.gradients]
        return [*parts, Part(_over(penalty, unit**2), 1e-3), Part(negative, 1e-6)]

    elements = sum(parameter.numel() for parameter in buffers.parameters)
    state = sum(tensor.nbytes for tensor in buffers.reference_tensors())
    weights = sum(tensor.nbytes for tensor in buffers.parameters)
    # gradients are read and written, parameters read, references read and written
    traffic = 3 * weights + 2 * state
    return Case(
        benchmark="penalty_",
        name=f"{name}: {len(shapes)} tensors, {elements / 1e6:.4g} M bf16 parameters, references {kind}",
        contestants=_contestants(buffers, backends, compiled),
        restore=restore,
        outcome=outcome,
        truth="eager",
        traffic=traffic,
        limit="copy",
        baselines=("eager", "compiled"),
        goals=goals,
        goals_of=backends,
        by_call=by_call,
        state_bytes_per_parameter=state / elements,
    )


def _over(tensor, unit):
    # by a power of two, so that nothing is rounded
    return tensor if unit == 1.0 else tensor * (1 / unit)


def _tolerance(tensor):
    return max(1e-5, torch.finfo(tensor.dtype).eps)


def cases(device, backends, *, tiny: bool) -> Iterator:
    """Functions that make a case each, so that one's memory is free before the next."""
    large = model_shapes(2, 64, 4, 2, 16, 96) if tiny else model_shapes()
    small = small_shapes(20 if tiny else 3000)
    shards = [(math.prod(shape) // 8,) for shape in large]
    llama = partial(_case, device=device, backends=backends, kind="bf16")
    yield partial(llama, "Llama-3.2-3B, tiny gradients", large, goals=GOALS, make=tiny_buffers, unit=TINY)
    yield partial(llama, "Llama-3.2-3B, an eighth, unaligned", shards, goals={}, make=shard_buffers)
    for kind in REFERENCES:
        yield partial(_case, "Llama-3.2-3B", large, kind, device, backends, goals=GOALS)
        yield partial(_case, "small", small, kind, device, backends, goals=GOALS_SMALL, by_call=True)
