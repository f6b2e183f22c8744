"""One regularised step: what goes in over its micro-batches, and the figures that come out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssiuu_fast.host_copy import HostCopy
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.shards import local_part

# what to do about a step with non-finite attributions; a GPU is not waited for
IN_TIME = "Don't take this step"
LATE = (
    "They were counted on a GPU in the step before, which was probably taken: where the weights are no numbers any "
    "more, go back to saved ones"
)


# one for each regularised parameter; None outside of a graph
Gradients = list[Tensor | None]


class Summed(NamedTuple):
    """g of a parameter over all ranks, and whether this one had a part in it."""

    g: Tensor
    own: bool


@dataclass
class MicroBatch:
    """Some samples of a step: Σ_s T_s with its graph, how many of them underflowed, and their loss, where it is to be
    sent back too."""

    target: Tensor
    samples: int
    underflows: Tensor
    sample_ids: list[int] | None = None
    last: bool = True
    loss: Tensor | None = None


@dataclass
class StepResult:
    """The sums of one regularised step, at whatever grain; scalars and counts on the device."""

    penalty: Tensor
    negative: Tensor
    elements: int
    gradient_square: Tensor | None  # ‖∂R/∂φ‖²; None where it wasn't measured
    underflows: list[Tensor]  # one a micro-batch
    names: list[str]
    nonfinite_counts: Tensor  # one a name
    absent: list[str]
    change: Tensor | None = None  # see ChangeWatch.measure


@dataclass
class StepStatistics:
    """What the last regularised step did. Tensors stay on their device until a figure is asked for."""

    result: StepResult
    weight: float  # λ; 0 while it is being calibrated
    every: int

    @cached_property
    def penalty(self) -> float:
        """R = Σ (A − A_ref)² over the regularised elements with A < 0.

        An element is a scalar of a parameter, or a neuron; with reference="initial", a neuron in one sample.
        """
        return self.result.penalty.item()

    @cached_property
    def negative_share(self) -> float:
        """Share of the regularised elements whose attribution is negative."""
        return self.result.negative.item() / self.result.elements

    @cached_property
    def underflows(self) -> int:
        """Samples whose target is 0 in fp32: they add nothing to the penalty."""
        return sum(int(count.item()) for count in self.result.underflows)

    @cached_property
    def nonfinite(self) -> int:
        """Elements whose attribution was not finite; they were left out."""
        return int(self.result.nonfinite_counts.sum().item())

    @cached_property
    def relative_change(self) -> float | None:
        """Median |A − A_ref| / |A| of a sample of elements; None unless the references have 16 or 8 bits."""
        if self.result.change is None:
            return None
        change = self.result.change.item()
        return change if math.isfinite(change) else None

    @property
    def absent(self) -> int:
        """Regularised parameters, or tapped modules, that were not in the step's graph."""
        return len(self.result.absent)

    @cached_property
    def penalty_gradient_norm(self) -> float | None:
        """‖∂R/∂φ‖, before λ.

        None where it isn't known: at neuron granularity the penalty reaches the weights inside the loss's own backward
        pass, and only while λ is being calibrated is its part measured on its own.
        """
        if self.penalty == 0:
            return 0.0
        square = self.result.gradient_square
        return None if square is None else square.item() ** 0.5

    @property
    def added_norm(self) -> float | None:
        """‖every · λ ∂R/∂φ‖: the norm of what was added to the gradient, at scale 1; None where it isn't known."""
        if self.weight == 0:
            return 0.0
        norm = self.penalty_gradient_norm
        return None if norm is None else self.weight * self.every * norm


class NonfiniteWatch:
    """Raises for the non-finite elements of a step. What a GPU counted is looked at a step later, without a wait."""

    def __init__(self):
        self._unread: tuple[list[str], HostCopy] | None = None

    def expect(self, names: list[str], counts: Tensor) -> None:
        """counts: int64, one a name."""
        self._unread = (names, HostCopy(counts))

    def check(self) -> None:
        """FloatingPointError if the step had any; once."""
        if self._unread is None:
            return
        (names, copy), self._unread = self._unread, None
        named = [(name, count) for name, count in zip(names, copy.read(), strict=True) if count]
        if named:
            listed = ", ".join(f"{name} ({count})" for name, count in named[:8])
            more = f" and {len(named) - 8} more" if len(named) > 8 else ""
            raise FloatingPointError(
                f"non-finite attributions in {listed}{more}: those elements added nothing. "
                f"{LATE if copy.from_gpu else IN_TIME}; lower the learning rate or the scale, or pass "
                "nonfinite='count' to go on without them"
            )


def summed(result: StepResult, ranks: Ranks, shards: Ranks) -> StepResult:
    """The result of all ranks, the same on each.

    ranks: those whose samples are one batch. shards: those over which the elements are spread.
    """
    if ranks.size == 1:
        return result
    underflows = ranks.sum_(torch.stack([count.to(result.underflows[0].device) for count in result.underflows]).sum())
    result = replace(result, underflows=[underflows])
    if shards.size == 1:
        return result
    # whole numbers under 2^53 are exact in fp64. Shards that were moved to the host are summed where the model is
    home = result.nonfinite_counts.device
    scalars = torch.stack([result.penalty, result.gradient_square, result.negative.double()])
    sums = torch.cat([scalars.to(home), result.nonfinite_counts.double()])
    sums = shards.sum_(sums.to(underflows.device)).to(home)
    return replace(
        result,
        penalty=sums[0],
        gradient_square=sums[1],
        negative=sums[2].long(),
        nonfinite_counts=sums[3:].long(),
    )


# ranks with the same gradients differ by less
SAME = 1e-3


def norm_of_all(norm: float, ranks: Ranks) -> float:
    """The norm that every rank has, the same bits on all. ValueError where theirs differ: .grad isn't averaged yet."""
    norms = ranks.gather(norm)
    if max(norms) - min(norms) > SAME * max(norms):
        raise ValueError(
            f"the loss's gradient has another norm on each rank, {min(norms):.4g} to {max(norms):.4g}: call "
            "after_backward after the loop has averaged .grad over the ranks"
        )
    return sum(norms) / len(norms)


def gradient_norm(parameters: Iterable[nn.Parameter], shards: Ranks) -> float:
    """Euclidean norm of the `.grad` of all parameters, each summed in fp32; 0 where there is none.

    shards: the ranks over which they are spread.
    """
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack([norm.double().to(norms[0].device) for norm in norms]))
    return norm.item() if shards.size == 1 else shards.sum_(norm.square().to(shards.numbers_device)).sqrt().item()
