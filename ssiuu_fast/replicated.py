"""The gradient of the target where every rank holds the whole model: DDP, a plain model, one process."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.agreement import Agreement
from ssiuu_fast.graph_order import leaf_order
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.shared_backward import Plan
from ssiuu_fast.step import Gradients, MicroBatch, Summed

# numbers that `agree` asks for
_ASKED = 7


class Replicated:
    """g by autograd on each rank's own samples, and one sum over the ranks a step.

    The penalty is then formed from equal numbers, and equal, on every rank.
    """

    def __init__(
        self,
        model: nn.Module | None,
        parameters: list[nn.Parameter],
        process_group,
        ddp: nn.parallel.DistributedDataParallel | None = None,
    ):
        self._model = model
        self._parameters = parameters
        self._ddp = ddp
        # the ranks whose samples are one batch, and those over which the elements of a parameter are spread
        self.ranks = Ranks(ddp.process_group if process_group is None and ddp is not None else process_group)
        self.shards = Ranks.alone()
        # whether what is added to a `.grad` during the loss's backward pass stays there. At its end DDP copies over it,
        # which a plain model may come to be in
        self.keeps_grad = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        # the number of samples, who has a gradient of which parameter and who has it in its graph; or what `agree` asks
        self.agreement = Agreement(self.ranks, max(_ASKED, 1 + 2 * len(parameters)), self._ranks_meet)

    def local(self) -> list[Tensor]:
        """What of each parameter lies on this rank: all."""
        return self._parameters

    def places(self) -> None:
        """Where that lies in the whole; None where it is the whole."""
        return None

    def step_gradients(self, batch: MicroBatch, scale: float) -> tuple[Gradients, int]:
        """scale · ∂T/∂φ over this rank's samples and their number; None for parameters outside its graph."""
        gradients = engines.target_gradients(batch.target, self._parameters, scale=scale)
        if not batch.last:
            self.agreement.pass_by(batch.last)
        return gradients, batch.samples

    def agree(self, batch: MicroBatch, plan: Plan) -> None:
        """Makes the plan that of all ranks, where they meet in this micro-batch's backward pass.

        One that needs two passes makes all take two. Where all come to their parameters in the same order, what they
        sum on the way meets its like, and nothing that DDP sums.
        """
        if self.ranks.size == 1 or not self._ranks_meet(batch.last):
            return
        order = None
        if not plan.reason and batch.last and self._sums_by_nodes():
            order = leaf_order(batch.loss, list(self._model.parameters()))
        halves = (0, 0) if order is None else (order >> 24, order & 0xFFFFFF)
        numbers = bool(plan.reason), bool(plan.kept), order is None, *halves, *(half**2 for half in halves)
        refusing, keeping, unknown, *sums = self.agreement.sums(list(map(int, numbers)))[:_ASKED]
        if refusing:
            plan.reason = plan.reason or "another rank needs two"
            return
        # Σ x² · ranks = (Σ x)² where x is the same on all ranks, and only there
        alike = all(square * self.ranks.size == total**2 for total, square in zip(sums[:2], sums[2:], strict=True))
        plan.sums_on_the_way = keeping > 0 and not unknown and alike

    def _sums_by_nodes(self) -> bool:
        """Whether all that is summed over ranks in a backward pass is known, and begun by its nodes."""
        # a hook of DDP for communication may begin a sum when another has ended; and a plain model's loop may do
        # anything
        return self._ddp is not None and not self._ddp._comm_hooks

    def complete(
        self, gradients: Gradients, samples: int, present: set[int], summed: dict[int, Summed]
    ) -> tuple[Gradients, int, set[int]]:
        """All over the ranks, once a step; None for parameters of which no rank has a gradient.

        present: those in this rank's graphs; of the result, in some rank's. summed: by index what is over them already.
        """
        if self.ranks.size == 1:
            return gradients, samples, present
        count = len(self._parameters)
        own = [summed[index].own if index in summed else gradients[index] is not None for index in range(count)]
        in_graph = [int(index in present) for index in range(count)]
        samples, *users = self.agreement.sums([samples, *map(int, own), *in_graph])[: 1 + 2 * count]
        used = [index for index in range(count) if users[index]]
        late = [index for index in used if index not in summed]
        whole = list(gradients)
        for index in late:
            if whole[index] is None:
                whole[index] = torch.zeros_like(self._parameters[index], requires_grad=False)
        self.ranks.sum_all_([whole[index] for index in late])
        for index in summed.keys() & used:
            whole[index] = summed[index].g
        return whole, samples, {index for index, used in enumerate(users[count:]) if used}

    def pass_gradients(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[Gradients, int]]:
        """∂T/∂φ and the number of samples of each of this rank's batches, of which others may have more or fewer."""
        for batch in batches:
            yield engines.target_gradients(batch.target, self._parameters, retain_graph=False), batch.samples

    def complete_pass(self, sums: list[Tensor], samples: int) -> int:
        """Sums over the ranks what was summed over a pass, in place; the number of samples of all."""
        samples = self.agreement.sums([samples])[0]
        self.ranks.sum_all_(sums)
        return samples

    def give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient

    def _ranks_meet(self, last: bool) -> bool:
        # the loss of this micro-batch is about to be reduced, and so that of every rank's
        return last or (self._ddp is not None and self._ddp.require_backward_grad_sync)
