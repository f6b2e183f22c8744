"""The processes that share a training step, and sums over them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# what a rank may raise that the others raise too; anything else is a RuntimeError there
_SHARED_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, FloatingPointError)}


class Ranks:
    """The ranks of a process group; a single one where torch.distributed isn't initialised.

    group: None is the default group. Sums over a single rank do nothing.
    """

    def __init__(self, group=None):
        initialised = dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if initialised else 1
        self.rank = dist.get_rank(group) if initialised else 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor with its sum over all ranks in place; same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value) -> list:
        """What each rank gave, in rank order; plain values (numbers, strings, lists), not tensors."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def agree(self, condition: bool, device: torch.device) -> bool:
        """Whether the condition holds on any rank: the same answer everywhere."""
        if self.size == 1:
            return condition
        return bool(self.sum_(torch.tensor(int(condition), device=device)).item())

    def gather_rows(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks below each other, in rank order; tensor: [counts[rank], columns]."""
        if self.size == 1:
            return tensor
        # collectives take equal shapes
        padded = tensor.new_zeros(max(counts), tensor.shape[1])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=self.group)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """What one rank raises in here is raised by all of them, so that none waits in vain for another.

        Nothing in here may wait for the other ranks. device: where the group's backend sums; it is waited for.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        if not self.agree(error is not None, device):
            return
        errors = self.gather(None if error is None else (type(error).__name__, str(error)))
        if error is not None:
            raise error
        rank, (kind, message) = next((rank, found) for rank, found in enumerate(errors) if found)
        raise _SHARED_ERRORS.get(kind, RuntimeError)(f"on rank {rank}: {message}")
