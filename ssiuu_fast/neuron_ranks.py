"""The ranks that share a step at the grain of neurons: what they wait for together, and what the loop divides by."""

from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.agreement import Agreement
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.selection import base_layer
from ssiuu_fast.shards import is_sharded, sharded_modules
from ssiuu_fast.taps import Taps


class WholeModels:
    """Every rank holds the whole model: DDP, a plain model, one process. A pass to the taps is one rank's own."""

    def __init__(self, process_group, ddp: nn.parallel.DistributedDataParallel | None):
        self._ddp = ddp
        self.ranks = Ranks(ddp.process_group if process_group is None and ddp is not None else process_group)
        # those over which the elements of a parameter are spread
        self.shards = Ranks.alone()
        self.agreement = Agreement(self.ranks, due=self._ranks_meet)

    def begin_pass(self, taps: Taps, target: Tensor, modules: int) -> None:
        """Before a pass from the target to the taps of so many modules."""

    def end_passes(self) -> None:
        """After all passes of a set_reference, of which ranks may have more or fewer."""
        self.agreement.sums()

    def loop_divides_by(self) -> float:
        """What the loop divides a sum of gradients over the ranks by."""
        return self.ranks.size

    def _ranks_meet(self, last: bool) -> bool:
        # the loss of this micro-batch is about to be reduced, and so that of every rank's
        return last or (self._ddp is not None and self._ddp.require_backward_grad_sync)


class ShardedModels:
    """FSDP2: a pass to the taps gathers shards, and is one of all ranks."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], process_group, calibrated: bool):
        from ssiuu_fast.sharded import parameter_groups, ranks_of

        if calibrated:
            raise ValueError(
                "relative_weight with granularity='neuron' under FSDP2: what the penalty comes to at sharded "
                "parameters can't be measured on its own. Give weight, as a run on one GPU or under DDP found it"
            )
        self._groups = parameter_groups(model)
        device = self._groups[0].mesh_info.mesh.device_type
        for name, module in modules.items():
            if base_layer(module).weight.device.type != device:
                raise ValueError(
                    f"{name} is kept off the {device} by FSDP2 (CPUOffloadPolicy), which granularity='neuron' doesn't "
                    "work with: leave the offloading out"
                )
        # ignored by fully_shard, or gathered just now, they are no DTensors, and the taps don't mind
        parameters = {name: p for name, p in model.named_parameters() if is_sharded(p)}
        self.ranks, self.shards = ranks_of(self._groups, parameters, process_group)
        # whether a rank still has a batch
        self.agreement = Agreement(self.ranks, 1, lambda last: True)

    def begin_pass(self, taps: Taps, target: Tensor, modules: int) -> None:
        """Raises on all ranks what one can't go on with, before the others wait for it in the pass."""
        from ssiuu_fast.sharded import refuse_unless_together

        engines.refuse_missing(target, taps.in_graph(target) * modules, modules, *engines.TAPPED)
        (with_batch,) = self.agreement.sums([1])
        refuse_unless_together(with_batch, self.ranks, expected=self.ranks.size)

    def end_passes(self) -> None:
        """ValueError where another rank goes on with a batch."""
        from ssiuu_fast.sharded import refuse_unless_together

        (with_batch,) = self.agreement.sums()
        refuse_unless_together(with_batch, self.ranks, expected=0)

    def loop_divides_by(self) -> float:
        """What FSDP2 divides a sum of gradients over the ranks by."""
        from ssiuu_fast.sharded import divide_factor

        return divide_factor(self._groups, self.ranks)


def ranks_of_step(
    model: nn.Module,
    ddp: nn.parallel.DistributedDataParallel | None,
    modules: dict[str, nn.Module],
    process_group,
    *,
    calibrated: bool,
) -> WholeModels | ShardedModels:
    """calibrated: whether the gradient of the penalty has to be measured on its own."""
    if sharded_modules(model):
        return ShardedModels(model, modules, process_group, calibrated)
    engines.refuse_sharded(model.named_parameters(), "tensor parallel is not supported")
    return WholeModels(process_group, ddp)
