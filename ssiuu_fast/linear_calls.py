"""The calls of linear modules in a graph: the input of each, and the gradient at its output when it is sent back."""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ssiuu_fast.kept_tensor import KeptTensor
from ssiuu_fast.selection import is_linear

_KEY = "ssiuu_fast.linear_call"

See = Callable[["LinearCall", Tensor, Tensor], None]


class LinearCalls:
    """Notes every call of some linear modules in its graph, for as long as this object lives.

    Nothing of a call outlives its graph, and its input is let go of where autograd lets go of what the module
    saved. The model's outputs and gradients don't change.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        handles = []
        for name, module in modules.items():
            handles += [module.register_forward_pre_hook(_cast), module.register_forward_hook(_Hook(self, name))]
        weakref.finalize(self, _remove, handles)

    def note(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        call = LinearCall(self, name, module, inputs, output)
        # the only way from a graph back to the call, so that it lives as long as its node
        output.grad_fn.metadata[_KEY] = [*output.grad_fn.metadata.get(_KEY, ()), call]
        output.register_hook(call)

    def of_node(self, node) -> Iterator["LinearCall"]:
        """The calls whose output this node of a graph gave."""
        return (call for call in node.metadata.get(_KEY, ()) if call.owner() is self)


class LinearCall:
    """One call of a linear module in one graph. shape: of its input. see: set for the one backward pass that is to be
    told of the gradient at the output, as see(call, input, gradient)."""

    def __init__(self, owner: LinearCalls, name: str, module: nn.Module, inputs: Tensor, output: Tensor):
        self.owner = weakref.ref(owner)
        self.name = name
        self.module = module
        self.shape = inputs.shape
        self.dtype = output.dtype
        self.see: See | None = None
        self._input: KeptTensor | None = KeptTensor(inputs)

    def __call__(self, gradient: Tensor) -> None:
        # autograd's hook at the output
        see, self.see = self.see, None
        if see is not None:
            see(self, self._input.get(), gradient)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._input = None


class _Hook:
    """The forward hook of one module. A copied or pickled model has dead ones: its graphs are its own."""

    def __init__(self, calls: LinearCalls | None, name: str):
        self._calls = (lambda: None) if calls is None else weakref.ref(calls)
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        # a compiled graph has no calls
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not output.requires_grad:
            return
        calls = self._calls()
        if calls is not None and inputs:
            calls.note(self._name, module, inputs[0], output)

    def __reduce__(self):
        return _Hook, (None, self._name)


def _cast(module: nn.Module, inputs: tuple) -> tuple | None:
    """What autocast is about to do inside, so that what is kept here and what the module saves is one tensor."""
    if torch.compiler.is_compiling() or not inputs:
        return None
    first, *others = inputs
    if not torch.is_autocast_enabled(first.device.type) or first.dtype == torch.float64:
        return None
    return (first.to(torch.get_autocast_dtype(first.device.type)), *others)


def can_be_noted(module: nn.Module) -> bool:
    """Whether its output is input · Wᵀ + b and nothing else."""
    plain = type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"
    # accelerate's hooks and the like put another forward on the object
    return is_linear(module) and plain and "forward" not in vars(module)


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()
