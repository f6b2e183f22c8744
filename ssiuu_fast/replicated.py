"""The gradient of the target where every rank holds the whole model: DDP, a plain model, one process."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.agreement import Agreement
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.step import MicroBatch

Gradients = list[Tensor | None]


class Replicated:
    """g by autograd on each rank's own samples, and one sum over the ranks a step.

    The penalty is then formed from equal numbers, and equal, on every rank.
    """

    def __init__(
        self, parameters: list[nn.Parameter], process_group, ddp: nn.parallel.DistributedDataParallel | None = None
    ):
        self._parameters = parameters
        self._ddp = ddp
        # the ranks whose samples are one batch, and those over which the elements of a parameter are spread
        self.ranks = Ranks(ddp.process_group if process_group is None and ddp is not None else process_group)
        self.shards = Ranks.alone()
        # the number of samples, who has a gradient of which parameter, and who has it in its graph
        self.agreement = Agreement(self.ranks, 1 + 2 * len(parameters), self._ranks_meet)

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

    def any_refuses_one_pass(self, batch: MicroBatch, refuses: bool) -> bool:
        """Whether some rank can't have g from the loss's own pass, where the ranks meet in that."""
        if self.ranks.size == 1 or not self._ranks_meet(batch.last):
            return refuses
        return bool(self.agreement.sums([int(refuses)] + [0] * (2 * len(self._parameters)))[0])

    def complete(self, gradients: Gradients, samples: int, present: set[int]) -> tuple[Gradients, int, set[int]]:
        """All over the ranks, once a step; None for parameters of which no rank has a gradient.

        present: those in this rank's graphs; of the result, in some rank's.
        """
        if self.ranks.size == 1:
            return gradients, samples, present
        count = len(self._parameters)
        mine = [int(gradient is not None) for gradient in gradients]
        samples, *users = self.agreement.sums([samples, *mine, *(int(index in present) for index in range(count))])
        whole = [
            torch.zeros_like(parameter, requires_grad=False) if used and gradient is None else gradient
            for gradient, parameter, used in zip(gradients, self._parameters, users[:count], strict=True)
        ]
        self.ranks.sum_all_([gradient for gradient in whole if gradient is not None])
        return whole, samples, {index for index, used in enumerate(users[count:]) if used}

    def pass_gradients(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[Gradients, int]]:
        """∂T/∂φ and the number of samples of each of this rank's batches, of which others may have more or fewer."""
        for batch in batches:
            yield engines.target_gradients(batch.target, self._parameters, retain_graph=False), batch.samples

    def complete_pass(self, sums: list[Tensor], samples: int) -> int:
        """Sums over the ranks what was summed over a pass, in place; the number of samples of all."""
        samples, *_ = self.agreement.sums([samples] + [0] * (2 * len(self._parameters)))
        self.ranks.sum_all_(sums)
        return samples

    def give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient

    def _ranks_meet(self, last: bool) -> bool:
        # the loss of this micro-batch is about to be reduced, and so that of every rank's
        return last or (self._ddp is not None and self._ddp.require_backward_grad_sync)
