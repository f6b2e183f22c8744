"""How many bytes of tensors are alive, and how many operations were asked for: an allocator's account, without one."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


class LiveMemory(TorchDispatchMode):
    """Counts the memory that operators made while it is on; what they were given, and views of it, is not theirs.

    A storage is counted once, whatever its views, from the operator that made it to the end of its last reference. What
    an operator makes and drops inside itself isn't seen. Works on real and on fake tensors alike.
    """

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._alive = 0
        # the most bytes that were alive since the last reset_peak()
        self.peak = 0
        # multiplications and additions of matrix products and attention
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self._alive)
        self.flops += _flops(function._overloadpacket, args, kwargs, result)
        return result

    def bytes(self) -> int:
        return self._alive

    def reset_peak(self) -> None:
        self.peak = self._alive

    def _forget(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _flops(operator, args, kwargs, result) -> int:
    # torch counts attention on GPUs only
    if operator is _aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if operator is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    counted = flop_registry.get(operator)
    return 0 if counted is None else counted(*args, **kwargs, out_val=result)
