"""Seeing each tapped output h and ∂T/∂h once, in one backward pass that computes no gradient of a weight."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssiuu_fast import engines

See = Callable[[str, Tensor, Tensor], None]

_OVERWRITTEN = ("modified by an inplace operation", "modified inplace")


class AttributionTaps:
    """Identities on the outputs of modules; their backward hands h and the gradient at h to `see`.

    Each has a second input, one scalar that requires grad. The backward pass towards that scalar runs through every
    tap, whatever is frozen, and below the lowest tapped module there is no graph at all. h is kept as autograd keeps
    what it needs: without a copy, together with those who need it too, and not at all under checkpointing.
    """

    def __init__(self, modules: dict[str, nn.Module], see: See):
        self._modules = modules
        self._see = see
        self._scalar = torch.zeros((), requires_grad=True)
        self._seen: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, target: Tensor) -> None:
        """Runs see(name, h, ∂target/∂h) for every module, last first, and frees the graph.

        Raises ValueError for a module that the graph holds twice, or not at all.
        """
        self._seen = set()
        if target.requires_grad:
            engines.differentiate(target, [self._scalar], retain_graph=False)
        missing = self._modules.keys() - self._seen
        if missing:
            raise ValueError(self._unseen(sorted(missing)))

    def _hook(self, name: str):
        def tap(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if not isinstance(output, Tensor):
                raise ValueError(f"{name} puts out a {type(output).__name__}, not one tensor: leave it out of modules")
            return _Tap.apply(output, self._scalar, self, name)

        return tap

    def receive(self, name: str, hidden: Tensor, gradient: Tensor) -> None:
        if name in self._seen:
            raise ValueError(
                f"{name} was used twice in one forward pass: its neurons have two outputs at a token. Leave it out of "
                "modules"
            )
        self._seen.add(name)
        self._see(name, hidden, gradient)

    def _unseen(self, missing: list[str]) -> str:
        return (
            f"{len(missing)} of {len(self._modules)} tapped modules took no part in the answer's log-probability "
            f"(the first is {missing[0]}): they were never called, or what they put out went nowhere. Choose those "
            "that do by modules=[...]"
        )


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, scalar: Tensor, taps: AttributionTaps, name: str) -> Tensor:
        ctx.save_for_backward(output)
        ctx.taps = taps
        ctx.name = name
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (hidden,) = ctx.saved_tensors
        ctx.taps.receive(ctx.name, hidden.detach(), gradient.detach())
        return gradient, None, None, None


@contextmanager
def overwriting_explained() -> Iterator[None]:
    """Around forward and backward: what autograd says of a tapped output that was overwritten, with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _OVERWRITTEN):
            raise ValueError(
                "this model writes into the output of a tapped module in place, which loses the output its neurons "
                f"had: leave that module out of modules. torch says: {error}"
            ) from error
        raise
