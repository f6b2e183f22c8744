"""A tensor that is kept as autograd keeps what it saves, by a holder who can let go of it at any time."""

import torch
from torch import Tensor

# those on what autograd saves; torch before 2.8 doesn't say
_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class KeptTensor:
    """Checkpointing drops and recomputes it like any saved tensor, and gives it back a single time in each pass.

    Without hooks on what is saved it is the tensor itself, and one that was written into meanwhile isn't given.
    """

    # what makes a node of the function that saves it
    _scalar = torch.zeros((), requires_grad=True)

    def __init__(self, tensor: Tensor):
        # a node costs the host fifteen times as much, and only hooks on what is saved make a difference
        hooked = _HOOKS is None or _HOOKS(False) is not None
        self._tensor = None if hooked else tensor.detach()
        # of all that share the memory
        self._version = tensor._version
        self._node = _Keep.apply(tensor.detach(), self._scalar).grad_fn if hooked else None

    @property
    def changed(self) -> bool:
        """Whether it was written into, as far as that is known before `get`."""
        return self._tensor is not None and self._tensor._version != self._version

    def pass_by(self) -> None:
        """In a pass that has no use for it: checkpointing keeps what it recomputed until it was asked for."""
        if self._node is not None:
            self._node.saved_tensors  # noqa: B018

    def get(self) -> Tensor:
        """Raises RuntimeError, as autograd does, where it was written into."""
        if self.changed:
            raise RuntimeError("a tensor that was kept for the backward pass has been modified by an inplace operation")
        if self._node is None:
            return self._tensor
        (tensor,) = self._node.saved_tensors
        return tensor


class _Keep(torch.autograd.Function):
    """A node that no graph leads to."""

    @staticmethod
    def forward(ctx, tensor: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)
