"""One regularised step at the grain of neurons: its micro-batches, and what they come to over all ranks."""

import torch
from torch import Tensor

from ssiuu_fast.neuron_measurement import Measurement
from ssiuu_fast.neuron_references import SampleReferences
from ssiuu_fast.step import MicroBatch, StepResult


class NeuronStep:
    """The micro-batches of a step, each of which gets its penalty at once; or one, which gets it when all ranks' parts
    of its attributions were summed.

    An error in `add` is one of all ranks, which then `finish` together. grain: the NeuronGrain that begins the step.
    """

    # the target's own pass tells the attributions that the loss's then needs
    road = "two backwards: attributions of neurons are needed before the loss is sent back"
    kept_rows = None

    def __init__(self, grain, scale: float, weight: float | None):
        self.scale = scale
        self._grain = grain
        self._ranks = grain.ranks
        # while λ is being calibrated ∂R/∂φ is measured with λ = 1 and at scale 1, whatever the loss's: in 16 bits a
        # square of numbers that are as large as the scale allows is inf. The loss's own pass then gets nothing.
        # The loop takes the mean over ranks of what is to be a sum
        self._weight = (1 / scale if weight is None else weight) * grain.loop_divides_by()
        self._penalty: Tensor | float = 0.0
        self._negative: Tensor | int = 0
        self._elements = 0
        self._samples = 0
        self._nonfinite: dict[str, Tensor] = {}
        self._underflows: list[Tensor] = []
        self._gradient = InjectedGradient(grain) if weight is None else None
        # waits for the other ranks' parts
        self._part: tuple[MicroBatch, Measurement] | None = None
        # of samples whose references aren't known to all ranks
        self._fresh = SampleReferences()

    def add(self, batch: MicroBatch) -> bool:
        """Takes up a micro-batch; its loss carries the penalty and is never sent back here."""
        measured = self._grain.measure(batch, self.scale, self._weight)
        self._samples += batch.samples
        self._underflows.append(batch.underflows)
        if self._grain.compares_samples:
            self._store_samples(batch, measured)
            self._take(batch, measured)
        else:
            self._part = batch, measured
        self._grain.agreement.pass_by(batch.last)
        return False

    def finish(self) -> StepResult:
        found = self._part[1].found if self._part else list(self._nonfinite)
        fresh = list(self._fresh.rows)
        shares = self._ranks.gather((self._samples, self._elements, found, fresh))
        modules = [name for name in self._grain.modules if any(name in found for _, _, found, _ in shares)]
        if self._grain.compares_samples:
            known = {name: tensor[: len(fresh)] for name, tensor in self._fresh.tensors.items()}
            self._grain.store_over_ranks([(fresh, found) for _, _, found, fresh in shares], known)
            self._elements = sum(elements for _, elements, _, _ in shares)
            self._sum_over_ranks(modules)
        else:
            batch, measured = self._part
            measured.sum_over_ranks({name: self._grain.forms[name] for name in modules}, self._weight)
            self._grain.store(measured.attributions, sum(samples for samples, *_ in shares), None)
            self._take(batch, measured)
        return StepResult(
            penalty=self._penalty,
            negative=self._negative,
            elements=self._elements,
            gradient_square=None if self._gradient is None else self._gradient.square(),
            underflows=[self._ranks.sum_(torch.stack(self._underflows).sum())],
            names=modules,
            nonfinite_counts=torch.stack([self._nonfinite[name].to(self._penalty.device) for name in modules]),
            absent=[name for name in self._grain.modules if name not in modules],
        )

    def _take(self, batch: MicroBatch, measured: Measurement) -> None:
        self._grain.inject(measured)
        if self._gradient is not None:
            self._gradient.add(batch)
        self._penalty = self._penalty + measured.penalty()
        self._negative = self._negative + measured.negative()
        self._elements += measured.elements()
        for name, count in measured.nonfinite.items():
            self._nonfinite[name] = self._nonfinite.get(name, 0) + count

    def _store_samples(self, batch: MicroBatch, measured: Measurement) -> None:
        if self._ranks.size == 1:
            self._grain.store(measured.attributions, batch.samples, batch.sample_ids)
            return
        places = self._grain.lacking(batch.sample_ids)
        if places:
            attributions = {name: attribution[places] for name, attribution in measured.attributions.items()}
            self._fresh.store(attributions, len(places), [batch.sample_ids[place] for place in places])

    def _sum_over_ranks(self, modules: list[str]) -> None:
        if self._ranks.size == 1:
            return
        device = self._penalty.device
        none = torch.zeros((), dtype=torch.int64)
        counts = [self._negative, *(self._nonfinite.get(name, none) for name in modules)]
        self._penalty = self._ranks.sum_(self._penalty)
        self._negative, *counts = self._ranks.sum_(torch.stack([count.to(device) for count in counts]))
        self._nonfinite = dict(zip(modules, counts, strict=True))


class InjectedGradient:
    """‖∂R/∂φ‖² over a step: of its one micro-batch gradient by gradient, of several after they were summed."""

    def __init__(self, grain):
        self._grain = grain
        self._ranks = grain.ranks
        self._sums: dict[int, Tensor] = {}
        self._squares: list[Tensor] = []

    def add(self, batch: MicroBatch) -> None:
        alone = self._ranks.size == 1 and batch.last and not self._sums
        self._grain.measure_injected(batch.target, self._square if alone else self._sum)

    def square(self) -> Tensor:
        """Equal on all ranks."""
        if self._ranks.size > 1:
            self._mean_over_ranks()
        for gradient in self._sums.values():
            self._square(0, gradient)
        if not self._squares:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([square.to(self._squares[0].device) for square in self._squares]).sum()

    def _mean_over_ranks(self) -> None:
        """What the loop makes of the gradients. A parameter may be in the graph of another rank only."""
        for index, parameter in enumerate(self._grain.parameters):
            gradient = self._sums.get(index)
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            self._sums[index] = self._ranks.sum_(gradient.to(_wide(gradient))).div_(self._ranks.size)

    def _sum(self, index: int, gradient: Tensor) -> None:
        if index in self._sums:
            self._sums[index].add_(gradient)
        else:
            self._sums[index] = gradient.detach().clone()

    def _square(self, index: int, gradient: Tensor) -> None:
        # a norm, not a sum of squares: in fp32 small squares vanish
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=_wide(gradient))
        self._squares.append(norm.double().square())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
