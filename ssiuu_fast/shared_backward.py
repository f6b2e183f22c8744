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
from ssiuu_fast.replicated import Gradients
from ssiuu_fast.selection import NamedParameters
from ssiuu_fast.taps import has_injection

# rows with |T'_s| up to this are skipped. Their part of the penalty's gradient is of the order of T'², which fp32 holds
# as 0 beside a weight's usual gradient
NEGLIGIBLE = 1e-16
# |w_s| against the largest: dY of a row under this isn't divided by it
SMALLEST_WEIGHT = 1e-12

# nodes through which a weight reaches the operator that uses it
_ALIASES = ("TBackward0", "TransposeBackward0", "ToCopyBackward0")

Visit = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass
class Plan:
    """How one micro-batch's g is had; or why not in this way.

    reason: why it takes two passes; empty where one is enough. present: the regularised parameters in the graph, by
    index. rows: how many samples the graph has; kept: which of them have a part in g. factor: r, where it is the same
    for all rows; else weights: [rows] r on the device. calls: of the modules whose products are needed.
    """

    reason: str = ""
    present: set[int] = field(default_factory=set)
    rows: int = 0
    kept: list[int] = field(default_factory=list)
    factor: float | None = None
    weights: Tensor | None = None
    calls: list[LinearCall] = field(default_factory=list)
    # parameters of which nothing but these calls makes use
    covered: set[int] = field(default_factory=set)

    @property
    def road(self) -> str:
        """In words."""
        return f"two backwards: {self.reason}" if self.reason else "one backward"


class SharedBackward:
    """Sends a loss back and gathers ∂T/∂φ of the regularised parameters on the way."""

    def __init__(self, model: nn.Module, parameters: NamedParameters):
        self._parameters = list(parameters.values())
        self._indices = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._calls = LinearCalls(
            {name: module for name, module in model.named_modules() if can_be_noted(module) and self._owned(module)}
        )

    def plan(self, target: Tensor, loss: Tensor, scale: float) -> Plan:
        """Looks at the graph; the host then waits for two numbers a sample. scale: the factor on g."""
        found = _row_nodes(target)
        if len(found) != 1:
            return Plan(
                f"log_probs come from {len(found)} calls of sequence_log_probs, and one is needed to tell the samples "
                "apart"
            )
        (node,) = found
        for what, top in (("loss", loss), ("target", target)):
            if self._reached(top, node):
                return Plan(f"the {what} depends on the model by other ways than log_probs")
        survey = self._survey(node)
        engines.refuse_missing(
            target, len(survey.uses), len(self._parameters), "regularised parameters", "wrapped, sharded or frozen"
        )
        if survey.injected:
            return Plan("another regulariser adds to this graph's gradients")
        edges = [GradientEdge(node, 0)]
        (of_target,) = engines.differentiate(target, edges)
        (of_loss,) = engines.differentiate(loss, edges)
        if of_loss is None:
            return Plan("the loss doesn't depend on log_probs")
        plan = Plan(present=set(survey.uses), rows=len(of_target), calls=survey.calls)
        plan.covered = {index for index, uses in survey.uses.items() if uses == survey.calls_of[index]}
        factors = self._factors(plan, of_target, of_loss, scale)
        if plan.reason or not plan.kept:
            return plan
        if len(plan.kept) == plan.rows and len(set(factors)) == 1:
            plan.factor = factors[0]
            return plan
        plan.weights = torch.tensor(factors, dtype=of_target.dtype).to(of_target.device, non_blocking=True)
        plan.reason = self._obstacle(plan, node.batch_shape)
        return plan

    def run(self, plan: Plan, loss: Tensor, gradients: Gradients, visit: Visit | None = None) -> None:
        """Sends the loss back; adds this micro-batch's part to gradients (overwritten in place).

        visit(index, g, gradient): called as soon as g of a parameter is whole and the loss's gradient is about to be
        added to its `.grad`; what it returns is added in place of that. g is then let go of.
        """
        pass_ = _Pass(plan, self._parameters, self._indices, gradients, visit)
        handles = [
            self._parameters[index].register_hook(partial(pass_.see_gradient, index)) for index in sorted(plan.present)
        ]
        if plan.weights is not None:
            for call in plan.calls:
                call.see = pass_.see_call
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for call in plan.calls:
                call.see = None

    def _owned(self, module: nn.Module) -> bool:
        return any(id(parameter) in self._indices for parameter in module.parameters(recurse=False))

    def _reached(self, top: Tensor, node) -> bool:
        """Whether a regularised parameter is reached from here by a way that isn't through the node."""
        return any(
            id(getattr(other, "variable", None)) in self._indices for other in engines.nodes([top.grad_fn], stop=node)
        )

    def _survey(self, node) -> "_Survey":
        survey = _Survey()
        # a weight's alias stands for the weight
        stands_for: dict = {}
        edges = []
        for other in engines.nodes([node]):
            leaf = getattr(other, "variable", None)
            if leaf is not None:
                if id(leaf) in self._indices:
                    stands_for[other] = self._indices[id(leaf)]
                continue
            edges += [(other, following) for following, _ in other.next_functions if following is not None]
            survey.injected = survey.injected or has_injection(other)
            survey.calls += self._calls.of_node(other)
        for _ in _ALIASES:
            # an alias of an alias
            for other, following in edges:
                if other.name() in _ALIASES and following in stands_for:
                    stands_for[other] = stands_for[following]
        for other, following in edges:
            if following in stands_for and other not in stands_for:
                survey.uses[stands_for[following]] += 1
        for call in survey.calls:
            for parameter in call.module.parameters(recurse=False):
                if id(parameter) in self._indices:
                    survey.calls_of[self._indices[id(parameter)]] += 1
        return survey

    def _factors(self, plan: Plan, of_target: Tensor, of_loss: Tensor, scale: float) -> list[float]:
        """r of every row; notes in the plan which are kept, or a reason against it."""
        targets, weights = torch.stack([of_target.double(), of_loss.double()]).tolist()
        if not all(map(math.isfinite, [*targets, *weights])):
            plan.reason = "the loss or the target is not a number"
            return []
        plan.kept = [row for row, target in enumerate(targets) if abs(target) > NEGLIGIBLE]
        least = SMALLEST_WEIGHT * max(map(abs, weights), default=0.0)
        small = next((row for row in plan.kept if abs(weights[row]) <= least), None)
        if small is not None:
            plan.reason = f"row {small} has a part in the target and none in the loss"
            return []
        kept = set(plan.kept)
        return [scale * targets[row] / weights[row] if row in kept else 0.0 for row in range(plan.rows)]

    def _obstacle(self, plan: Plan, batch_shape: tuple[int, int]) -> str:
        """Why products at the linear modules don't give g; empty where they do."""
        uncovered = plan.present - plan.covered
        if uncovered:
            return (
                f"{len(uncovered)} regularised parameter(s) are not, or not only, weights and biases of linear modules "
                "that were called as such"
            )
        for call in plan.calls:
            if len(call.shape) != 3 or tuple(call.shape[:2]) != batch_shape:
                return (
                    f"{call.name} was given {list(call.shape)}, and the log-probs are of {list(batch_shape)} samples "
                    "and tokens: rows can't be told apart"
                )
            if call.dtype == torch.float16:
                return f"{call.name} computes in float16, whose range is too small to weigh rows"
        return ""


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

    def see_call(self, call: LinearCall, inputs: Tensor, gradient: Tensor) -> None:
        module = call.module
        index = self._indices.get(id(module.weight))
        if index is not None and index in self._plan.present:
            pair = (gradient, inputs.to(gradient.dtype))
            # Conv1D keeps its weight the other way round
            pair = pair if isinstance(module, nn.Linear) else pair[::-1]
            self._add(index, partial(weighted_weight_gradient, *pair, self._plan.weights, rows=self._rows))
        index = None if module.bias is None else self._indices.get(id(module.bias))
        if index is not None and index in self._plan.present:
            self._add(index, partial(self._bias, gradient))

    def see_gradient(self, index: int, gradient: Tensor) -> Tensor | None:
        if self._plan.factor is not None:
            if self._gradients[index] is None:
                self._gradients[index] = gradient.detach().mul(self._plan.factor)
            else:
                self._gradients[index].add_(gradient.detach(), alpha=self._plan.factor)
        if self._visit is None or self._gradients[index] is None:
            return None
        whole, self._gradients[index] = self._gradients[index], None
        return self._visit(index, whole, gradient)

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


def _row_nodes(target: Tensor) -> list:
    """The nodes in the graph of the target whose output is a number for each sample, in the batch's order."""
    classes = tuple(function._backward_cls for function in ROW_FUNCTIONS)
    return [node for node in engines.nodes([target.grad_fn]) if isinstance(node, classes)]
