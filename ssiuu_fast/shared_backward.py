"""g from the loss's own backward pass: one more weight-gradient product at each regularised linear module."""

# A loss that is a function of the log-probabilities ℓ_s sends w_s = ∂L/∂ℓ_s into the graph of sample s, where the
# target would send T'_s = ∂T/∂ℓ_s. Samples don't mix, so at every output the target's gradient is r_s = T'_s / w_s
# times the loss's, and with dY the loss's and X the input of a linear module
#     ∂T/∂W = Σ_s r_s dY_sᵀ X_s
# which needs no second pass through the graph (ARCHITECTURE, "The faster road").

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ssiuu_fast import engines
from ssiuu_fast.linear_calls import LinearCall, LinearCalls, can_be_noted
from ssiuu_fast.ops.sequence_log_probs import ROW_FUNCTIONS
from ssiuu_fast.ops.weighted_weight_gradient import weighted_weight_gradient
from ssiuu_fast.selection import NamedParameters
from ssiuu_fast.step import Gradients
from ssiuu_fast.taps import TAP_NODE, has_injection

# rows with |T'_s| under this are skipped: in fp32 T' has lost digits below it, and is soon 0. Not sooner: λ has no
# scale, and relative_weight makes up for whatever the T' of its first steps were
NEGLIGIBLE = torch.finfo(torch.float32).tiny
# |w_s| from which dY of a row can be divided by it: against the largest, whose rounding it would share, and by itself,
# since dY is a product of it and must not leave the range of fp32
SMALLEST_SHARE = 1e-12
SMALLEST_WEIGHT = 1e-30

# nodes through which a weight reaches the operator that uses it
_ALIASES = ("TBackward0", "TransposeBackward0", "ToCopyBackward0")

# what a row's place in the batch is lost in, between the model and its log-probs; and what keeps it
_REORDERING = ("Index", "Gather", "Flip", "Roll", "Cat", "Transpose", "Permute")
_IN_PLACE = ("Slice", "Alias", "View", "UnsafeView", "ToCopy", "Clone", "Unsqueeze", "Squeeze", *_REORDERING)

Visit = Callable[[int, Tensor | None], None]


@dataclass
class Plan:
    """How one micro-batch's g is had; or why not in this way.

    reason: why it takes two passes; empty where one is enough. present: the regularised parameters in the graph, by
    index. covered: those of which nothing but noted calls makes use. rows: how many samples the graph has; kept: which
    of them have a part in g. factor: r, where it is the same for all rows; else weights: [rows] r on the device. calls:
    of the modules whose products are then needed. sums_on_the_way: whether g is summed over the ranks meanwhile.
    """

    reason: str = ""
    present: set[int] = field(default_factory=set)
    covered: set[int] = field(default_factory=set)
    rows: int = 0
    kept: list[int] = field(default_factory=list)
    factor: float | None = None
    weights: Tensor | None = None
    calls: list[LinearCall] = field(default_factory=list)
    sums_on_the_way: bool = False

    @property
    def road(self) -> str:
        """In words."""
        return f"two backwards: {self.reason}" if self.reason else "one backward"


class _TwoPassesNeeded(Exception):
    """Why."""


class SharedBackward:
    """Sends a loss back and gathers ∂T/∂φ of the regularised parameters on the way."""

    def __init__(self, model: nn.Module, parameters: NamedParameters):
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._indices = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        modules = {name: module for name, module in model.named_modules() if can_be_noted(module)}
        self._calls = LinearCalls(
            {name: module for name, module in modules.items() if self._owned(module)}, self._indices.keys()
        )

    def plan(self, target: Tensor, loss: Tensor, scale: float) -> Plan:
        """Looks at the graph; the host then waits for two numbers a sample. scale: the factor on g."""
        try:
            return self._plan(target, loss, scale)
        except _TwoPassesNeeded as needed:
            return Plan(str(needed))

    def _plan(self, target: Tensor, loss: Tensor, scale: float) -> Plan:
        node = _row_node(target)
        for what, top in (("loss", loss), ("target", target)):
            if self._reached(top, node):
                raise _TwoPassesNeeded(f"the {what} depends on the model by other ways than log_probs")
        survey = self._survey(node)
        engines.refuse_missing(
            target, len(survey.uses), len(self._parameters), "regularised parameters", "wrapped, sharded or frozen"
        )
        self._refuse(survey)
        edges = [GradientEdge(node, 0)]
        (of_target,) = engines.differentiate(target, edges)
        (of_loss,) = engines.differentiate(loss, edges)
        if of_loss is None:
            raise _TwoPassesNeeded("the loss doesn't depend on log_probs")
        factors = self.row_factors(of_target, of_loss, scale)
        plan = Plan(present=set(survey.uses), rows=len(factors), calls=survey.calls)
        plan.covered = {index for index, uses in survey.uses.items() if uses == survey.calls_of[index]}
        plan.kept = [row for row, factor in enumerate(factors) if factor is not None]
        if not plan.kept:
            return plan
        if len(set(factors)) == 1:
            plan.factor = factors[0]
            return plan
        weights = torch.tensor([factor or 0.0 for factor in factors], dtype=of_target.dtype)
        plan.weights = weights.to(of_target.device, non_blocking=True)
        self._refuse_products(plan, node.batch_shape)
        return plan

    def run(self, plan: Plan, loss: Tensor, gradients: Gradients, visit: Visit | None = None) -> None:
        """Sends the loss back; adds this micro-batch's part to gradients (overwritten in place).

        visit(index, g): called for every parameter that is present as soon as its g is whole, None where no micro-batch
        gave it any. The loss's gradient will have come to its `.grad` by the next call. g is then let go of.
        """
        sent = _Pass(plan, self._parameters, self._indices, gradients, visit)
        handles = [
            self._parameters[index].register_hook(partial(sent.at_parameter, index)) for index in sorted(plan.present)
        ]
        if plan.weights is not None:
            for call in plan.calls:
                call.on_gradient = sent.at_output
        try:
            with engines.explained():
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for call in plan.calls:
                call.on_gradient = None

    def row_factors(self, of_target: Tensor, of_loss: Tensor, scale: float) -> list[float | None]:
        """r of every row, None for those that are skipped, on the host; what has no values overrides this."""
        return _factors(*torch.stack([of_target, of_loss.to(of_target)]).tolist(), scale)

    def _owned(self, module: nn.Module) -> bool:
        return any(id(parameter) in self._indices for parameter in module.parameters(recurse=False))

    def _reached(self, top: Tensor, node) -> bool:
        """Whether a regularised parameter is reached from here by a way that isn't through the node."""
        between = engines.nodes([top.grad_fn], ends=lambda other: other is node)
        return any(id(getattr(other, "variable", None)) in self._indices for other in between)

    def _survey(self, node) -> "_Survey":
        survey = _Survey()
        # thousands of nodes in every step: no container is made for one, each of which Python's collector would visit
        edges_to: dict = {}
        # a weight's alias stands for the weight
        stands_for: dict = {}
        aliases = []
        for other in engines.nodes([node]):
            ends = other.next_functions
            for following, _ in ends:
                edges_to[following] = edges_to.get(following, 0) + 1
            if not ends:
                index = self._indices.get(id(getattr(other, "variable", None)))
                if index is not None:
                    stands_for[other] = index
                continue
            name = other.name()
            if name in _ALIASES:
                aliases.append((other, ends[0][0]))
            elif name == TAP_NODE:
                survey.injected = survey.injected or has_injection(other)
            # an output may be an alias too
            if name in self._calls.node_names:
                survey.calls += self._calls.of_node(other)
        known = -1
        while known != len(stands_for):
            # an alias of an alias
            known = len(stands_for)
            stands_for |= {other: stands_for[following] for other, following in aliases if following in stands_for}
        for other, index in stands_for.items():
            survey.uses[index] += edges_to[other]
        for other, _ in aliases:
            if other in stands_for:
                # its own edge is no use
                survey.uses[stands_for[other]] -= 1
        for call in survey.calls:
            for parameter in call.parameters.values():
                survey.calls_of[self._indices[id(parameter)]] += 1
        return survey

    def _refuse(self, survey: "_Survey") -> None:
        """Raises _TwoPassesNeeded where a gradient on its way is changed, or too small, for this to see its parts."""
        if survey.injected:
            raise _TwoPassesNeeded("another regulariser adds to this graph's gradients")
        if len({self._parameters[index].device for index in survey.uses}) > 1:
            # autograd has a thread for each
            raise _TwoPassesNeeded("the regularised parameters are on several devices")
        for index in sorted(survey.uses):
            parameter = self._parameters[index]
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise _TwoPassesNeeded(f"a hook on {self._names[index]} may change its gradient")
            if parameter.dtype == torch.float16:
                raise _TwoPassesNeeded(f"{self._names[index]} is float16, whose range is too small to weigh rows")
        for call in survey.calls:
            if call.dtype == torch.float16:
                raise _TwoPassesNeeded(f"{call.name} computes in float16, whose range is too small to weigh rows")

    def _refuse_products(self, plan: Plan, batch_shape: tuple[int, int]) -> None:
        """Raises _TwoPassesNeeded where products at the linear modules don't give g."""
        uncovered = sorted(plan.present - plan.covered)
        if uncovered:
            raise _TwoPassesNeeded(
                f"{self._names[uncovered[0]]} is not, or not only, the weight or bias of a linear module that was "
                f"called as such; the same of {len(uncovered) - 1} others"
            )
        double = plan.weights.dtype == torch.float64
        for call in plan.calls:
            if len(call.shape) != 3 or tuple(call.shape[:2]) != batch_shape:
                raise _TwoPassesNeeded(
                    f"{call.name} was given {list(call.shape)}, and the log-probs are of {list(batch_shape)} samples "
                    "and tokens: rows can't be told apart"
                )
            if call.input_changed:
                raise _TwoPassesNeeded(f"the input of {call.name} was changed in place after it was used")
            if (call.dtype == torch.float64) != double or call.device != plan.weights.device:
                raise _TwoPassesNeeded(
                    f"{call.name} computes in {call.dtype} on {call.device}, the log-probs in {plan.weights.dtype} on "
                    f"{plan.weights.device}"
                )


@dataclass
class _Survey:
    """What a graph holds: how many uses of each regularised parameter, and how many of them are noted calls."""

    uses: Counter = field(default_factory=Counter)
    calls_of: Counter = field(default_factory=Counter)
    calls: list[LinearCall] = field(default_factory=list)
    injected: bool = False


class _Pass:
    """What the hooks of one backward pass do."""

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[nn.Parameter],
        indices: dict[int, int],
        gradients: Gradients,
        visit: Visit | None,
    ):
        self._plan = plan
        self._parameters = parameters
        self._indices = indices
        self._gradients = gradients
        self._visit = visit
        self._rows = None if plan.weights is None else _rows(plan.kept, plan.rows, plan.weights.device)

    def at_output(self, call: LinearCall, gradient: Tensor) -> None:
        """With the loss's gradient at the output of a linear module."""
        if "weight" in call.parameters:
            pair = (gradient, call.input().to(gradient.dtype))
            pair = pair[::-1] if call.transposed else pair
            product = partial(weighted_weight_gradient, *pair, self._plan.weights, rows=self._rows)
            self._add(self._indices[id(call.parameters["weight"])], product)
        if "bias" in call.parameters:
            self._add(self._indices[id(call.parameters["bias"])], partial(self._bias, gradient))

    def at_parameter(self, index: int, gradient: Tensor | None) -> Tensor | None:
        """With the loss's gradient of a parameter, over all its uses; None where a node gave none.

        What is returned takes its place on the way to `.grad`.
        """
        sparse = gradient is not None and gradient.layout != torch.strided
        if gradient is not None and self._plan.factor is not None:
            dense = gradient.to_dense() if sparse else gradient
            if self._gradients[index] is None:
                self._gradients[index] = dense.mul(self._plan.factor).contiguous()
            else:
                self._gradients[index].add_(dense, alpha=self._plan.factor)
        if self._visit is not None:
            whole, self._gradients[index] = self._gradients[index], None
            self._visit(index, whole)
        if gradient is None or sparse or self._is_product(index):
            return None
        # autograd may have handed parts of one tensor to several, and `.grad` is written to
        return gradient.clone(memory_format=torch.contiguous_format)

    def _is_product(self, index: int) -> bool:
        """Whether the gradient is made by matrix products of linear modules, and so has memory of its own."""
        return index in self._plan.covered and self._parameters[index].dim() == 2

    def _add(self, index: int, product: Callable[..., Tensor]) -> None:
        parameter = self._parameters[index]
        if self._gradients[index] is None:
            self._gradients[index] = product().to(parameter.dtype)
        else:
            product(out=self._gradients[index])

    def _bias(self, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        rows = slice(None) if self._rows is None else self._rows
        sums = gradient[rows].sum(dim=1, dtype=self._plan.weights.dtype)
        weighted = self._plan.weights[rows] @ sums
        return weighted if out is None else out.add_(weighted)


def _rows(kept: list[int], rows: int, device: torch.device) -> slice | Tensor | None:
    """The kept rows: None for all, a slice where they lie together, else an index."""
    if len(kept) == rows:
        return None
    if kept[-1] - kept[0] == len(kept) - 1:
        return slice(kept[0], kept[-1] + 1)
    return torch.tensor(kept).to(device, non_blocking=True)


def _factors(targets: list[float], weights: list[float], scale: float) -> list[float | None]:
    """r of every row; None for those that are skipped. Raises _TwoPassesNeeded where a row's can't be had."""
    if not all(map(math.isfinite, [*targets, *weights])):
        raise _TwoPassesNeeded("the loss or the target is not a number")
    least = max(SMALLEST_WEIGHT, SMALLEST_SHARE * max(map(abs, weights), default=0.0))
    factors: list[float | None] = []
    for row, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        if abs(target) < NEGLIGIBLE:
            factors.append(None)
        elif abs(weight) < least:
            raise _TwoPassesNeeded(f"row {row} has a part in the target and none in the loss")
        else:
            factors.append(scale * target / weight)
    return factors


def _row_node(target: Tensor):
    """The node in the graph of the target whose output is a number for each sample, in the batch's order.

    Raises _TwoPassesNeeded where there is not one, or what it was given is not in the order of the model's batch.
    """
    classes = tuple(function._backward_cls for function in ROW_FUNCTIONS)
    # below one are logits, and not log-probs
    above = engines.nodes([target.grad_fn], ends=lambda node: isinstance(node, classes))
    found = [node for node in above if isinstance(node, classes)]
    if len(found) != 1:
        raise _TwoPassesNeeded(
            f"log_probs come from {len(found)} calls of sequence_log_probs, and one is needed to tell samples apart"
        )
    node = found[0].next_functions[0][0]
    while node is not None and node.name().startswith(_IN_PLACE):
        if node.name().startswith(_REORDERING):
            raise _TwoPassesNeeded(f"the model's output was put in another order ({node.name()})")
        node = node.next_functions[0][0]
    return found[0]
