"""One regularised step: what goes in over its micro-batches, and the figures that come out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ssiuu_fast.host_copy import HostCopy
from ssiuu_fast.ops.penalty import PenaltyResult


@dataclass
class StepStatistics:
    """What the last regularised step did. Tensors stay on their device until a figure is asked for."""

    result: PenaltyResult
    underflow_counts: list[Tensor]  # one a micro-batch
    elements: int
    weight: float  # λ; 0 while it is being calibrated
    every: int
    change: Tensor | None = None  # see ChangeWatch.measure

    @cached_property
    def penalty(self) -> float:
        """R = Σ (A − A_ref)² over the regularised elements with A < 0."""
        return self.result.penalty.item()

    @cached_property
    def negative_share(self) -> float:
        """Share of the regularised elements whose attribution is negative."""
        return self.result.negative.item() / self.elements

    @cached_property
    def underflows(self) -> int:
        """Samples whose target is 0 in fp32: they add nothing to the penalty."""
        return sum(int(count.item()) for count in self.underflow_counts)

    @cached_property
    def nonfinite(self) -> int:
        """Elements whose attribution was not finite; they were left out."""
        return self.result.nonfinite.item()

    @cached_property
    def relative_change(self) -> float | None:
        """Median |A − A_ref| / |A| of a sample of elements; None unless the references have 16 or 8 bits."""
        if self.change is None:
            return None
        change = self.change.item()
        return change if math.isfinite(change) else None

    @cached_property
    def penalty_gradient_norm(self) -> float:
        """‖∂R/∂φ‖, before λ."""
        return self.result.gradient_square.item() ** 0.5

    @property
    def added_norm(self) -> float:
        """‖every · λ ∂R/∂φ‖: the norm of what was added to the gradient, at scale 1."""
        return self.weight * self.every * self.penalty_gradient_norm


class MicroBatches:
    """Σ g over the micro-batches of one step."""

    def __init__(self, scale: float):
        self.scale = scale
        self.gradients: list[Tensor | None] = []
        self.underflows: list[Tensor] = []
        self.samples = 0

    def add(self, gradients: list[Tensor | None], underflows: Tensor, samples: int) -> None:
        self.samples += samples
        self.underflows.append(underflows)
        if not self.gradients:
            self.gradients = gradients
            return
        for index, gradient in enumerate(gradients):
            if self.gradients[index] is None:
                self.gradients[index] = gradient
            elif gradient is not None:
                self.gradients[index].add_(gradient)


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
                f"non-finite attributions in {listed}{more}: those elements added nothing. Don't take this step; lower "
                "the learning rate or the scale, or pass nonfinite='count' to go on without them"
            )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean norm of the `.grad` of all parameters, each summed in fp32; 0 where there is none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.linalg.vector_norm(torch.stack([norm.double().to(norms[0].device) for norm in norms])).item()
