"""The processes that share a training step, and sums over them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# small tensors are sent together, this many bytes at most at a time
BUCKET = 32 * 2**20
# sums that may be under way at once, each with a buffer of small tensors at most
UNDER_WAY = 4


class Ranks:
    """The ranks of a process group; a single one where torch.distributed isn't initialised.

    group: None is the default group. Sums over a single rank do nothing.
    """

    def __init__(self, group=None):
        initialised = dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if initialised else 1
        self.rank = dist.get_rank(group) if initialised else 0

    @classmethod
    def alone(cls) -> "Ranks":
        """This process by itself, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size, ranks.rank = None, 1, 0
        return ranks

    @property
    def numbers_device(self) -> torch.device:
        """Where numbers that the host wants to know are summed: the CPU, unless the backend is for GPUs only."""
        if self.size == 1 or "cpu:" in str(dist.get_backend_config(self.group)):
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor with its sum over all ranks in place; same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes its sum over all ranks. Contiguous, and of the same shapes and dtypes everywhere."""
        sums = RunningSums(self)
        for tensor in tensors:
            sums.add(tensor)
        sums.finish()

    def concatenated(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks behind each other, in rank order; they have one shape."""
        if self.size == 1:
            return tensor
        # what was moved to the host is sent from the GPU, where the backend knows no other way
        here = tensor.device.type in str(dist.get_backend_config(self.group))
        sent = tensor if here else tensor.to(self.numbers_device)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts).to(tensor.device)

    def gather_rows(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks below each other, in rank order; tensor: [counts[rank], columns]."""
        if self.size == 1:
            return tensor
        # collectives take equal shapes
        padded = tensor.new_zeros(max(counts), tensor.shape[1])
        padded[: len(tensor)] = tensor
        gathered = self.concatenated(padded).split(max(counts))
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    def gather(self, value) -> list:
        """What each rank gave, in rank order; plain values (numbers, strings, lists), not tensors."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What raises in the body on some ranks ends all of them, so that none waits for one that is gone.

        The first rank that failed raises its error, the others leave with status 1. No communication in the body.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self.gather(error is not None)
        if any(failed):
            if failed.index(True) == self.rank:
                raise error
            raise SystemExit(1)

    def agree(self, condition: bool, device: torch.device) -> bool:
        """Whether the condition holds on any rank: the same answer everywhere."""
        if self.size == 1:
            return condition
        return bool(self.sum_(torch.tensor(int(condition), device=device)).item())


class RunningSums:
    """Sums of tensors over all ranks, which run while the caller goes on.

    Small ones travel together in a buffer of BUCKET bytes, large ones by themselves and in place. Tensors come in the
    same order on every rank, and so does whatever else the ranks sum meanwhile.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        # by dtype and device, until they fill a buffer; and their bytes
        self._small: dict[tuple, list[Tensor]] = {}
        self._bytes: Counter = Counter()
        self._under_way: list[tuple[dist.Work, Tensor, list[Tensor]]] = []

    def add(self, tensor: Tensor) -> None:
        """A contiguous tensor of the same shape and dtype everywhere, to be left alone until `finish`."""
        if self._ranks.size == 1:
            return
        if tensor.nbytes >= BUCKET:
            self._start(tensor, [])
            return
        kind = (tensor.dtype, tensor.device)
        if self._bytes[kind] + tensor.nbytes > BUCKET:
            self._start_together(self._small.pop(kind))
            self._bytes[kind] = 0
        self._small.setdefault(kind, []).append(tensor)
        self._bytes[kind] += tensor.nbytes

    def finish(self) -> None:
        """Every tensor is its sum: for the device's next work, where that isn't the CPU."""
        for bucket in self._small.values():
            self._start_together(bucket)
        self._small, self._bytes = {}, Counter()
        while self._under_way:
            self._end_first()

    def _start_together(self, tensors: list[Tensor]) -> None:
        self._start(torch.cat([tensor.view(-1) for tensor in tensors]), tensors)

    def _start(self, sent: Tensor, parts: list[Tensor]) -> None:
        if len(self._under_way) == UNDER_WAY:
            self._end_first()
        self._under_way.append((dist.all_reduce(sent, group=self._ranks.group, async_op=True), sent, parts))

    def _end_first(self) -> None:
        work, sent, parts = self._under_way.pop(0)
        work.wait()
        if parts:
            for tensor, part in zip(parts, sent.split([tensor.numel() for tensor in parts]), strict=True):
                tensor.copy_(part.view_as(tensor))
