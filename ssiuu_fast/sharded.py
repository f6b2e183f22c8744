"""The gradient of the target where the parameters are sharded over ranks by FSDP2 (`fully_shard`)."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ssiuu_fast import engines
from ssiuu_fast.agreement import Agreement
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.selection import NamedParameters
from ssiuu_fast.shards import from_local_part, is_sharded, local_part, sharded_modules
from ssiuu_fast.shared_backward import Plan
from ssiuu_fast.step import Gradients, MicroBatch, Summed

# FSDP2's private parts, and where they were seen to be what they are taken for
_TESTED = "2.13"
_GROUP_PARTS = ("fsdp_params", "mesh_info", "gradient_divide_factor", "reduce_grads", "all_reduce_grads")
_PARAMETER_PARTS = ("sharded_param", "unsharded_accumulated_grad")


class Sharded:
    """g by a backward pass that FSDP2 reduces as it does the loss's, with every `.grad` put aside meanwhile.

    autograd.grad doesn't reach the sharded parameters. FSDP2 divides what it reduces, as a rule by the number of
    ranks, so the target is multiplied by as much: g is the sum. Each rank then works on its own shards.
    """

    def __init__(self, model: nn.Module, parameters: NamedParameters, process_group):
        self._groups = parameter_groups(model)
        self._context = sharded_modules(model)[0]._get_fsdp_state()._state_ctx
        # a module that is gathered just now has other objects in place of its shards, whose .grad stays empty
        gathered = {id(p._unsharded_param): p.sharded_param for p in self._managed() if hasattr(p, "_unsharded_param")}
        self._all = [gathered.get(id(parameter), parameter) for parameter in model.parameters()]
        self._parameters = list(parameters.values())
        self.ranks, self.shards = ranks_of(self._groups, parameters, process_group)
        self._names = [name for name, _ in model.named_parameters()]
        sharded = {id(p.sharded_param): p for p in self._managed()}
        self._sharded = [sharded[id(parameter)] for parameter in self._parameters]
        # whether a rank still has a batch, the number of samples, and who has which parameter in its graph. Every pass
        # is one of all ranks
        self.agreement = Agreement(self.ranks, 2 + len(self._all), lambda last: True)

    def local(self) -> list[Tensor]:
        """This rank's shard of each parameter; it may be empty."""
        return [local_part(parameter) for parameter in self._parameters]

    def places(self) -> list[dict[str, list[int]]]:
        """Where this rank's shard of each parameter lies in the whole."""
        return [_place(parameter) for parameter in self._parameters]

    def step_gradients(self, batch: MicroBatch, scale: float) -> tuple[Gradients, int]:
        """Shards of scale · ∂T/∂φ over all ranks' samples and their number; None outside of their graphs."""
        return self._gradients(batch, scale, retain_graph=True)

    def agree(self, batch: MicroBatch, plan: Plan) -> None:
        """All plans are for two passes."""

    def complete(
        self, gradients: Gradients, samples: int, present: set[int], summed: dict[int, Summed]
    ) -> tuple[Gradients, int, set[int]]:
        """They were summed on the way."""
        return gradients, samples, present

    def pass_gradients(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[Gradients, int]]:
        """As step_gradients, freeing each graph. ValueError where a rank has fewer batches than another."""
        for batch in batches:
            yield self._gradients(batch, 1.0, retain_graph=False)
        refuse_unless_together(self.agreement.sums()[0], self.ranks, expected=0)

    def complete_pass(self, sums: list[Tensor], samples: int) -> int:
        """They were summed on the way."""
        return samples

    def give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = from_local_part(parameter, gradient)

    def _gradients(self, batch: MicroBatch, scale: float, retain_graph: bool) -> tuple[Gradients, int]:
        self._refuse_unsynchronised()
        factor = divide_factor(self._groups, self.ranks)
        used = self._used(batch.target)
        with_batch, samples, *users = self.agreement.sums([1, batch.samples, *used])
        refuse_unless_together(with_batch, self.ranks, expected=self.ranks.size)
        self._refuse_used_by_some(users)
        return self._backward(batch.target, scale * factor, retain_graph), samples

    def _backward(self, target: Tensor, scale: float, retain_graph: bool) -> Gradients:
        stash = [parameter.grad for parameter in self._all]
        is_last = self._context.is_last_backward
        for parameter in self._all:
            parameter.grad = None
        # only at the end of a last backward pass does the current stream wait for what was reduced in it
        self._context.is_last_backward = True
        try:
            with engines.measuring():
                target.backward(torch.full_like(target, scale), retain_graph=retain_graph)
            gradients = [
                None if parameter.grad is None else local_part(parameter.grad) for parameter in self._parameters
            ]
        finally:
            self._context.is_last_backward = is_last
            for parameter, gradient in zip(self._all, stash, strict=True):
                parameter.grad = gradient
        return gradients

    def _managed(self) -> Iterator:
        """What FSDP2 knows of each parameter that it shards."""
        return (parameter for group in self._groups for parameter in group.fsdp_params)

    def _refuse_unsynchronised(self) -> None:
        off = any(not (group.reduce_grads and group.all_reduce_grads) for group in self._groups)
        left = any(_unreduced(parameter) for parameter in self._managed())
        if off or left or any(getattr(group, "_partial_reduce_output", None) is not None for group in self._groups):
            raise ValueError(
                f"gradient sync {'is' if off else 'was'} off under FSDP2 (set_requires_gradient_sync(False), or "
                "accelerate's no_sync): the gradients of target and loss would come back as one sum. Leave it on in "
                "every micro-batch"
            )

    def _used(self, target: Tensor) -> list[int]:
        """1 for each parameter of the model that is in the graph, 0 for the others; RuntimeError where none is sought.

        Before the backward pass, in which the other ranks would wait for this one.
        """
        leaves = engines.leaves(target)
        used = {id(p.sharded_param) for p in self._managed() if id(getattr(p, "_unsharded_param", None)) in leaves}
        found = sum(id(p.sharded_param) in used for p in self._sharded)
        engines.refuse_missing(
            target, found, len(self._parameters), "regularised parameters", "wrapped, sharded or frozen"
        )
        return [int(id(parameter) in used) for parameter in self._all]

    def _refuse_used_by_some(self, users: list[int]) -> None:
        """users: on how many ranks each parameter is in the graph. Those outside FSDP2 are on none."""
        # there zeros are reduced for what has no gradient
        filled = {
            id(p.sharded_param)
            for group in self._groups
            if getattr(group, "reduce_scatter_unused_params", False)
            for p in group.fsdp_params
        }
        some = [
            (name, count)
            for name, parameter, count in zip(self._names, self._all, users, strict=True)
            if count not in (0, self.ranks.size) and id(parameter) not in filled
        ]
        if some:
            remedy = "let every rank use the same parameters"
            if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
                remedy = f"call model.set_reduce_scatter_unused_params(True) after fully_shard, or {remedy}"
            name, count = some[0]
            raise ValueError(
                f"{name} is in the graph on {count} of {self.ranks.size} ranks, and {len(some)} parameters in all on "
                "some ranks only: FSDP2 sums on each rank what has a gradient there, so that one parameter's would be "
                f"added to another's, silently, or one rank would wait for ever; {remedy}"
            )


def divide_factor(groups: list, ranks: Ranks) -> float:
    """What FSDP2 divides a gradient by that it reduces. ValueError where that isn't one number."""
    factors = {group.gradient_divide_factor or ranks.size for group in groups}
    if len(factors) > 1:
        raise ValueError(
            f"set_gradient_divide_factor: the modules have different factors, {sorted(factors)}: give all the same"
        )
    return factors.pop()


def refuse_unless_together(with_batch: int, ranks: Ranks, expected: int) -> None:
    """with_batch: how many ranks have a batch where all must, or none."""
    if with_batch != expected:
        raise ValueError(
            f"set_reference or backward was given one more batch on {with_batch} of {ranks.size} ranks: under FSDP2 "
            "every rank needs as many batches as the others, which may be of different sizes"
        )


def _unreduced(parameter) -> bool:
    """Whether FSDP2 holds a gradient of an earlier backward pass that it has not reduced yet."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)


def parameter_groups(model: nn.Module) -> list:
    """What FSDP2 gathers and reduces together, of all modules that fully_shard was applied to.

    RuntimeError where this torch has other private parts than those that this package works with.
    """
    modules = sharded_modules(model)
    _refuse_other_parts(modules, "_get_fsdp_state")
    states = [module._get_fsdp_state() for module in modules]
    _refuse_other_parts(states, "_state_ctx")
    _refuse_other_parts([state._state_ctx for state in states], "is_last_backward")
    groups = [group for state in states for group in _groups_of_state(state)]
    _refuse_other_parts(groups, *_GROUP_PARTS)
    _refuse_other_parts([group.mesh_info for group in groups], "mesh")
    _refuse_other_parts([parameter for group in groups for parameter in group.fsdp_params], *_PARAMETER_PARTS)
    return groups


def _refuse_other_parts(objects: list, *names: str) -> None:
    for thing in objects:
        for name in names:
            if not hasattr(thing, name):
                raise RuntimeError(
                    f"{type(thing).__name__} of torch {torch.__version__} has no {name}: this package works with "
                    f"private parts of FSDP2, as they are in torch {_TESTED}; use that, or "
                    "DistributedDataParallel"
                )


def ranks_of(groups: list, parameters: NamedParameters, process_group) -> tuple[Ranks, Ranks]:
    """All ranks that the parameters are sharded over, and those with the shards of one copy of the model."""
    return _ranks(_mesh(groups, parameters), process_group)


def _groups_of_state(state) -> list:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    _refuse_other_parts([state], "_fsdp_param_group")
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _mesh(groups: list, parameters: NamedParameters):
    """The one mesh that all are sharded over. ValueError where there are several, or other DTensors."""
    mesh = groups[0].mesh_info.mesh
    if any(group.mesh_info.mesh != mesh for group in groups):
        raise ValueError("the model's modules are sharded over different meshes: give fully_shard the same one")
    for name, parameter in parameters.items():
        if not is_sharded(parameter):
            raise ValueError(
                f"{name} is not sharded just now, in a model that fully_shard was applied to: call reshard() on its "
                "modules before building the regulariser, and leave ignored parameters out with parameters=[...]"
            )
        sharded = [placement for placement in parameter.placements if type(placement) is Shard]
        others = [placement for placement in parameter.placements if not placement.is_replicate()]
        if parameter.device_mesh != mesh or len(sharded) != 1 or sharded != others:
            raise ValueError(
                f"{name} is a DTensor over {parameter.device_mesh} placed {parameter.placements}: tensor parallel "
                "is not supported, use fully_shard alone"
            )
    return mesh


def _ranks(mesh, process_group) -> tuple[Ranks, Ranks]:
    """All ranks of the mesh, and those with the shards of one copy of the model."""
    if mesh.ndim == 1:
        shards = Ranks(mesh.get_group())
        everyone = shards
    elif mesh.ndim == 2 and mesh.size() == dist.get_world_size():
        everyone, shards = Ranks(None), Ranks(mesh.get_group(1))
    else:
        raise ValueError(
            f"the model is sharded over {mesh}: give fully_shard a mesh of one dimension, or one of two "
            "(replicate, shard) over all ranks"
        )
    if process_group is not None and dist.get_process_group_ranks(process_group) != mesh.mesh.flatten().tolist():
        raise ValueError("process_group has other ranks than the mesh that the model is sharded over: leave it out")
    return everyone, shards


def _place(parameter: DTensor) -> dict[str, list[int]]:
    size, first = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return {"shape": list(parameter.shape), "first": list(first), "size": list(size)}
