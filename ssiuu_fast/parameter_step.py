"""One regularised step at the grain of parameters: g over its micro-batches, then the penalty."""

import torch
from torch import Tensor

from ssiuu_fast.penalty_pass import PenaltyPass
from ssiuu_fast.replicated import Gradients
from ssiuu_fast.shared_backward import Plan
from ssiuu_fast.step import MicroBatch, StepResult, summed


class ParameterStep:
    """Sums g over the micro-batches of a step; the penalty is formed when it is whole.

    With the last loss sent back in the same pass, in one process, that is parameter by parameter, as the gradients
    come. grain: the ParameterGrain that begins the step.
    """

    def __init__(self, grain, scale: float, weight: float | None):
        self.scale = scale
        # how the last micro-batch's g was had, and from how many rows in one pass
        self.road = ""
        self.kept_rows: int | None = None
        self._grain = grain
        self._weight = weight
        self._gradients: Gradients = [None] * len(grain.names)
        # parameters in the graph of some micro-batch
        self._present: set[int] = set()
        # of these an own gradient may be written over
        self._covered: set[int] = set()
        self._samples = 0
        self._underflows: list[Tensor] = []
        self._pass: PenaltyPass | None = None

    def add(self, batch: MicroBatch) -> bool:
        """Takes up a micro-batch. Whether its loss was sent back on the way."""
        self._underflows.append(batch.underflows)
        if batch.loss is not None:
            plan = self._grain.plan(batch, self.scale)
            self.road = plan.road
            if not plan.reason:
                self.kept_rows = len(plan.kept)
                self._add_in_one_pass(batch, plan)
                return True
        self.kept_rows = None
        gradients, samples = self._grain.step_gradients(batch, self.scale)
        self._samples += samples
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self._present.add(index)
            if self._gradients[index] is None:
                self._gradients[index] = gradient
            else:
                self._gradients[index].add_(gradient)
        return False

    def finish(self) -> StepResult:
        names = self._grain.names
        if self._pass is None:
            self._gradients, self._samples, self._present = self._grain.engine.complete(
                self._gradients, self._samples, self._present
            )
            self._begin_pass({index for index, gradient in enumerate(self._gradients) if gradient is not None})
        # all; or what the last micro-batch had no part in
        rest = {names[index]: gradient for index, gradient in enumerate(self._gradients) if gradient is not None}
        self._grain.add_to_grad(self._pass, rest)
        self._grain.end_pass(self._pass)
        sums, seen, counts, change = self._pass.close()
        whole = StepResult(
            penalty=sums.penalty,
            negative=sums.negative,
            elements=self._grain.elements,
            gradient_square=sums.gradient_square,
            underflows=self._underflows,
            names=seen,
            nonfinite_counts=counts,
            absent=[name for index, name in enumerate(names) if index not in self._present],
            change=change,
        )
        return summed(whole, self._grain.agreement.ranks, self._grain.shards)

    def _add_in_one_pass(self, batch: MicroBatch, plan: Plan) -> None:
        self._samples += batch.samples
        self._present |= plan.present
        add = None
        # before that, and before it is summed over ranks, g isn't whole
        if batch.last and self._grain.agreement.ranks.size == 1:
            summed_before = {index for index, gradient in enumerate(self._gradients) if gradient is not None}
            self._begin_pass(summed_before | plan.present if plan.kept else summed_before)
            self._covered = plan.covered
            add = self._add_penalty
        with self._grain.agreement.untold():
            self._grain.one_pass.run(plan, batch.loss, self._gradients, add)

    def _begin_pass(self, whole: set[int]) -> None:
        """whole: the parameters of which g is, or will be, known."""
        self._pass = self._grain.begin_pass(self._samples, self.scale, self._weight)
        self._pass.expect([self._grain.names[index] for index in sorted(whole)])

    def _add_penalty(self, index: int, g: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient with the penalty's; in place, where it comes from a linear module's own backward."""
        if index not in self._covered or not gradient.is_contiguous():
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        self._pass.add({self._grain.names[index]: g}, [gradient])
        return gradient
