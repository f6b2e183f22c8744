"""The peak of what tensors hold during a call, counted storage by storage: exact where allocators don't say."""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counter(TorchDispatchMode):
    """Follows the memory that operators make while it is on; what one takes and frees within itself isn't seen."""

    def __init__(self):
        super().__init__()
        self._alive = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        made = [storage for storage in _storages(result) if storage._cdata not in given]
        if made:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            for storage in made:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_of_tensors(call: Callable, device: torch.device) -> int:
    """Bytes by which tensors made during the call rise at most: on a GPU what its allocator counts, elsewhere ours."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Counter() as counter:
        call()
    return counter.peak
