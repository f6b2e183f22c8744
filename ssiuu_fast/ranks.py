"""The processes that share a training step, and sums over them."""

import torch
import torch.distributed as dist
from torch import Tensor


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
