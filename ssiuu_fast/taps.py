"""Taps on modules: where the gradient at a module's output is seen, and where another one is added to it.

A tap is an identity on the output of a module, put there by a forward hook. It has a second input, one scalar that
requires grad: the backward pass towards that scalar runs the backward of every tap in a graph, whatever is frozen, and
computes no gradient of a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.kept_tensor import KeptTensor
from ssiuu_fast.module_hooks import watch


class Taps:
    """Taps on some modules, for as long as this object or a graph that runs through it lives.

    Graphs of forward passes that are never measured pass through unchanged, and nothing of them outlives them.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self._scalar = torch.zeros((), requires_grad=True)
        self._see: Callable[[TappedOutput, Tensor, Tensor], None] | None = None
        self._visiting = False
        # whether the model writes into a module's output, by name and whether it trains: an in-place dropout only does
        # then. What isn't here was never measured
        self._overwritten: dict[tuple[str, bool], bool] = {}
        watch(self, modules)

    def measure(
        self,
        target: Tensor,
        see: Callable[["TappedOutput", Tensor, Tensor], None],
        *,
        scale: float = 1.0,
        retain_graph: bool = True,
    ) -> None:
        """Calls see(output, h, scale · ∂target/∂h) for each tapped output h in the graph of target, last module first.

        `see` must not write into either tensor. What it raises is raised here. h is let go of when it was seen, so a
        graph is measured once. Outputs that the graph doesn't use aren't seen.
        """
        self._see = see
        try:
            engines.differentiate(target, [self._scalar], scale=scale, retain_graph=retain_graph)
        finally:
            self._see = None

    def in_graph(self, target: Tensor) -> bool:
        """Whether one of them is in the graph of target."""
        return engines.has_leaf(target, {id(self._scalar)})

    def visit_gradients(
        self, target: Tensor, parameters: list[nn.Parameter], visit: Callable[[int, Tensor], None]
    ) -> None:
        """Runs visit(index, gradient) on what the injections alone come to at each parameter; they are used up."""
        self._visiting = True
        try:
            engines.visit_gradients(target, parameters, visit)
        finally:
            self._visiting = False

    def on_forward(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """The output with a tap on it: equal values, in the same memory or a copy."""
        training = module.training
        tapped = TappedOutput(self, name, output, training)
        output = _Tap.apply(output, self._scalar, tapped)
        if self._overwritten.get((name, training), True):
            # autograd refuses writes into the result of an identity, which would change h: a copy takes them. Whether
            # a model does this is seen when the first graph is measured, and most don't
            output = output.clone()
            tapped.writes = _version_counter(output)
        return output

    def send_back(self, tapped: "TappedOutput", gradient: Tensor) -> Tensor:
        """What the backward of a tap does: gradient is that of its output, the result that of its input."""
        if self._see is None:
            # another regulariser that looks at this graph must not use up what the loss's pass is to add
            return tapped.pass_on(gradient, add=self._visiting or not engines.is_measuring())
        if tapped.writes is not None:
            self._overwritten[tapped.name, tapped.training] = tapped.writes._version > 0
        self._see(tapped, tapped.release_hidden(), gradient)
        return gradient


class TappedOutput:
    """One output h of a tapped module, in one graph. It keeps a single tensor of that size: first h, then what is to
    be added to its gradient."""

    def __init__(self, taps: Taps, name: str, output: Tensor, training: bool):
        self.name = name
        self.training = training
        # counts the writes into the copy that the model works on, where it has one
        self.writes: Tensor | None = None
        # strong: a graph may be sent back after the taps were given up
        self.taps = taps
        self._injection: Tensor | None = None
        self._hidden: KeptTensor | None = KeptTensor(output)

    def inject(self, injection: Tensor, pending: "PendingInjections") -> None:
        """The next backward pass through the graph, unless it is one that only measures, adds `injection` to the
        gradient at h, once; it is overwritten."""
        self._injection = injection
        self._pending = pending
        pending.count += 1

    @property
    def injects(self) -> bool:
        """Whether something is to be added."""
        return self._injection is not None and not self._pending.abandoned

    def release_hidden(self) -> Tensor:
        if self._hidden is None:
            raise RuntimeError(
                "this graph was measured before: call regularizer.backward(log_probs) once for each forward pass, "
                "before loss.backward()"
            )
        # once: checkpointing gives a tensor back a single time in each pass
        kept, self._hidden = self._hidden, None
        return kept.get()

    def pass_on(self, gradient: Tensor, add: bool) -> Tensor:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # the engine frees what the graph has saved, node by node, and so do we
            self._hidden = None
        if self._injection is None or not add:
            return gradient
        injection, self._injection = self._injection, None
        if self._pending.abandoned:
            return gradient
        self._pending.count -= 1
        return injection.add_(gradient)


@dataclass
class PendingInjections:
    """How many injections didn't meet a backward pass yet; those of a graph that was dropped never will."""

    count: int = 0
    abandoned: bool = False

    def abandon(self) -> None:
        """They are not to be added any more."""
        self.count = 0
        self.abandoned = True


def has_injection(node) -> bool:
    """Whether this node of a graph, by name a TAP_NODE, is a tap that adds something to the gradient that comes by."""
    tapped = getattr(node, "tapped", None)
    return isinstance(tapped, TappedOutput) and tapped.injects


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, scalar: Tensor, tapped: TappedOutput) -> Tensor:
        ctx.tapped = tapped
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.tapped.taps.send_back(ctx.tapped, gradient), None, None


TAP_NODE = _Tap._backward_cls.__name__


def _version_counter(tensor: Tensor) -> Tensor:
    """An empty tensor with the version counter of `tensor`: it counts writes into it without keeping its memory."""
    counter = tensor.detach()
    counter.data = tensor.new_empty(0)
    return counter
