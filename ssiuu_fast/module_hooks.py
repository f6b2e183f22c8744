"""Forward hooks on modules that belong to an object, and go with it."""

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle


class Watcher(Protocol):
    def on_forward(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """Called with what a module was given and gave, in forward passes that build a graph. What it returns, if
        anything, takes the output's place."""


def watch(watcher: Watcher, modules: dict[str, nn.Module], *, first: bool = False) -> None:
    """Hooks that call watcher.on_forward, for as long as the watcher lives.

    first: before the hooks of others, for watchers that change nothing.
    """
    hooks = {name: _Hook(watcher, name, first) for name in modules}
    go_with(watcher, [module.register_forward_hook(hooks[name], prepend=first) for name, module in modules.items()])


def comes_first(watcher: Watcher, module: nn.Module) -> bool:
    """Whether the watcher sees what the module itself gave, and no hook of others may have changed that."""
    for hook in module._forward_hooks.values():
        if not isinstance(hook, _Hook) or not hook.first:
            return False
        if hook.watcher() is watcher:
            return not torch_module._global_forward_hooks
    return False


def go_with(owner: object, handles: Iterable[RemovableHandle]) -> None:
    """Removes the hooks when their owner is gone."""
    weakref.finalize(owner, _remove, list(handles))


class _Hook:
    """The forward hook of one module. A copied or pickled model has dead ones: its graphs are its own."""

    def __init__(self, watcher: Watcher | None, name: str, first: bool):
        self.watcher = (lambda: None) if watcher is None else weakref.ref(watcher)
        self.first = first
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        # what a compiled graph makes of a hook was settled when it was traced: there is nothing in it
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        watcher = self.watcher()
        return None if watcher is None else watcher.on_forward(self._name, module, inputs, output)

    def __reduce__(self):
        return _Hook, (None, self._name, self.first)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
