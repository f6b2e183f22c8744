"""The calls of linear modules in a graph: the input of each, and the gradient at its output when it is sent back."""

import weakref
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from ssiuu_fast.kept_tensor import KeptTensor
from ssiuu_fast.module_hooks import comes_first, go_with, watch
from ssiuu_fast.selection import is_linear

_KEY = "ssiuu_fast.linear_calls"

OnGradient = Callable[["LinearCall", Tensor], None]


class LinearCalls:
    """Notes every call of some linear modules in its graph, for as long as this object lives.

    parameters: ids of those whose gradient is of interest. Nothing of a call outlives its graph. Its input is kept
    where the weight is of interest, and goes when autograd lets go of what the module saved. The model's outputs and
    gradients don't change.
    """

    def __init__(self, modules: dict[str, nn.Module], parameters: Collection[int]):
        self._parameters = parameters
        # of nodes that gave the output of a call: a graph has thousands of others
        self.node_names: set[str] = set()
        watch(self, modules, first=True)
        go_with(self, [module.register_forward_pre_hook(_cast) for module in modules.values()])

    def on_forward(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not inputs or not output.requires_grad or not comes_first(self, module):
            return
        # a weight that something puts in the module's place for a pass is another one
        own = {kind: getattr(module, kind) for kind in ("weight", "bias")}
        own = {kind: p for kind, p in own.items() if id(p) in self._parameters}
        if own:
            node = output.grad_fn
            call = LinearCall(self, name, module, own, inputs[0], output)
            # the only way from a graph to the call, so that it lives as long as its node
            self.node_names.add(node.name())
            node.metadata[_KEY] = [*node.metadata.get(_KEY, ()), call]
            # of a node, and not of the tensor: it comes after the hooks that others put on the output
            node.register_prehook(call)

    def of_node(self, node) -> Iterator["LinearCall"]:
        """The calls whose output this node of a graph gave."""
        return (call for call in node.metadata.get(_KEY, ()) if call.owner() is self)


class LinearCall:
    """One call of a linear module in one graph.

    parameters: its weight and bias as far as they are of interest, by kind. shape, dtype, device: of the input, the
    output. on_gradient: set for one backward pass, which calls it with this call and the gradient at the output.
    """

    def __init__(
        self,
        owner: LinearCalls,
        name: str,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        inputs: Tensor,
        output: Tensor,
    ):
        self.owner = weakref.ref(owner)
        self.name = name
        self.parameters = parameters
        # GPT-2's Conv1D keeps its weight the other way round
        self.transposed = not isinstance(module, nn.Linear)
        self.shape = inputs.shape
        self.dtype = output.dtype
        self.device = output.device
        self.on_gradient: OnGradient | None = None
        self._place = output.output_nr
        self._input = KeptTensor(inputs) if "weight" in parameters else None

    @property
    def input_changed(self) -> bool:
        """Whether the input was written into after the call. autograd minds only where it had to save it."""
        return self._input is not None and self._input.changed

    def input(self) -> Tensor:
        """Once in a backward pass, while on_gradient is called."""
        return self._input.get()

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        # autograd's hook before the node whose output it is
        on_gradient, self.on_gradient = self.on_gradient, None
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        if on_gradient is not None and gradients[self._place] is not None:
            on_gradient(self, gradients[self._place])
        elif kept and self._input is not None:
            self._input.pass_by()
        if not kept:
            self._input = None


def _cast(module: nn.Module, inputs: tuple) -> tuple | None:
    """What autocast is about to do inside, so that what is kept here and what the module saves is one tensor."""
    if not inputs or torch.compiler.is_compiling():
        return None
    first, *others = inputs
    if not torch.is_autocast_enabled(first.device.type) or first.dtype == torch.float64:
        return None
    return (first.to(torch.get_autocast_dtype(first.device.type)), *others)


def can_be_noted(module: nn.Module) -> bool:
    """Whether its forward is input · Wᵀ + b and nothing else."""
    plain = type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"
    # accelerate's hooks and the like put another forward on the object
    return is_linear(module) and plain and module.weight.dim() == 2 and "forward" not in vars(module)
