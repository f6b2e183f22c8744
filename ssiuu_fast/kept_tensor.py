"""A tensor that is kept as autograd keeps what it saves, by a holder who can let go of it at any time."""

import torch
from torch import Tensor

# those on what autograd saves; torch before 2.8 doesn't say
_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class KeptTensor:
    """Checkpointing drops and recomputes it like any saved tensor, and gives it back a single time in each pass."""

    # what makes a node of the function that saves it
    _scalar = torch.zeros((), requires_grad=True)

    def __init__(self, tensor: Tensor):
        # a node costs the host fifteen times as much, and only hooks on what is saved make a difference
        hooked = _HOOKS is None or _HOOKS(False) is not None
        self._tensor = None if hooked else tensor.detach()
        self._node = _Keep.apply(tensor.detach(), self._scalar).grad_fn if hooked else None

    def get(self) -> Tensor:
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
