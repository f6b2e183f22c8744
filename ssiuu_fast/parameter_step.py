"""One regularised step at the grain of parameters: g over its micro-batches, then the penalty."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssiuu_fast.penalty_pass import PenaltyPass
from ssiuu_fast.ranks import RunningSums
from ssiuu_fast.shared_backward import Plan
from ssiuu_fast.step import Gradients, MicroBatch, StepResult, Summed, summed

# of the bytes of all regularised parameters
HELD_SHARE = 0.02


class HeldGradients:
    """g of a few parameters, by index, because a call costs the host as much as the pass over a small tensor takes."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._most = HELD_SHARE * sum(parameter.nbytes for parameter in parameters)
        self._held: dict[int, Tensor] = {}

    def add(self, index: int, g: Tensor | None) -> dict[int, Tensor]:
        """Those that came before, where with this one they would be over HELD_SHARE; they are then let go of."""
        if g is None:
            return {}
        size = sum(other.nbytes for other in self._held.values())
        before = self.let_go() if size + g.nbytes > self._most else {}
        self._held[index] = g
        return before

    def let_go(self) -> dict[int, Tensor]:
        held, self._held = self._held, {}
        return held


class ParameterStep:
    """Sums g over the micro-batches of a step; the penalty is formed when it is whole.

    With the last loss sent back in the same pass, where torch.distributed isn't initialised, that is a few parameters
    at a time, as the gradients come; of several ranks, the sums over them begin then. grain: the ParameterGrain that
    begins the step.
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
        self._samples = 0
        self._underflows: list[Tensor] = []
        self._pass: PenaltyPass | None = None
        self._parameters = grain.parameters
        self._held = HeldGradients(self._parameters)
        # over the ranks, begun while the last loss was sent back
        self._running_sums: RunningSums | None = None
        self._summed: dict[int, Summed] = {}

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
            self._complete()
            self._begin_pass({index for index, gradient in enumerate(self._gradients) if gradient is not None})
        # all; or what the last micro-batch had no part in
        rest = {index: gradient for index, gradient in enumerate(self._gradients) if gradient is not None}
        self._add_penalty(self._held.let_go() | rest)
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
        visit = None
        # before that, and before it is summed over ranks, g isn't whole
        if batch.last and self._grain.engine.keeps_grad:
            summed_before = {index for index, gradient in enumerate(self._gradients) if gradient is not None}
            self._begin_pass(summed_before | plan.present if plan.kept else summed_before)
            visit = self._hold
        elif plan.sums_on_the_way:
            self._running_sums = RunningSums(self._grain.agreement.ranks)
            visit = self._sum_over_ranks
        with self._grain.agreement.untold():
            self._grain.one_pass.run(plan, batch.loss, self._gradients, visit)

    def _begin_pass(self, whole: set[int]) -> None:
        """whole: the parameters of which g is, or will be, known."""
        self._pass = self._grain.begin_pass(self._samples, self.scale, self._weight)
        self._pass.expect([self._grain.names[index] for index in sorted(whole)])

    def _add_penalty(self, gradients: dict[int, Tensor]) -> None:
        """To the `.grad` of these parameters, which have their loss's."""
        self._grain.add_to_grad(self._pass, {self._grain.names[index]: g for index, g in gradients.items()})

    def _hold(self, index: int, g: Tensor | None) -> None:
        self._add_penalty(self._held.add(index, g))

    def _sum_over_ranks(self, index: int, g: Tensor | None) -> None:
        own = g is not None
        # another rank may have one
        g = g if own else torch.zeros_like(self._parameters[index], requires_grad=False)
        self._running_sums.add(g)
        self._summed[index] = Summed(g, own)

    def _complete(self) -> None:
        """Everything over the ranks."""
        if self._running_sums is not None:
            self._running_sums.finish()
        self._gradients, self._samples, self._present = self._grain.engine.complete(
            self._gradients, self._samples, self._present, self._summed
        )
