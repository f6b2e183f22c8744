"""In which order a backward pass comes to its parameters, so that ranks can tell whether theirs is the same."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush

from torch import Tensor, nn

from ssiuu_fast import engines

# autograd takes the node that was made last of those that are ready, leaves before all; of two leaves the one that was
# ready first, and of more whichever its heap has on top
_LEAVES_IN_ORDER = 2


def leaf_order(top: Tensor, parameters: Sequence[nn.Parameter]) -> int | None:
    """A 48-bit hash of the leaves in the order in which a backward pass from `top` comes to them.

    parameters: all of a model, which are known by their places in it. None where autograd doesn't say which is first:
    more than two leaves are ready at once (the backward of torch.compile, of fused RNNs), or there are several devices,
    each of which has a thread.
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    nodes = list(engines.nodes([top.grad_fn]))
    if len({metadata.device for node in nodes for metadata in node._input_metadata}) > 1:
        return None
    awaited = Counter(following for node in nodes for following, _ in node.next_functions)
    order = hashlib.blake2b(digest_size=6)
    # made last first; the number keeps nodes from being compared
    ready = [(0, 0, top.grad_fn)]
    pushed = 0
    while ready:
        *_, node = heappop(ready)
        leaves = 0
        for following, _ in node.next_functions:
            if following is None:
                continue
            awaited[following] -= 1
            if awaited[following]:
                continue
            if hasattr(following, "variable"):
                leaves += 1
                order.update(f"{_name(following.variable, places)}\n".encode())
            else:
                pushed += 1
                heappush(ready, (-following._sequence_nr(), pushed, following))
        if leaves > _LEAVES_IN_ORDER:
            return None
    return int.from_bytes(order.digest(), "big")


def _name(leaf: Tensor, places: dict[int, int]) -> str:
    return f"parameter {places[id(leaf)]}" if id(leaf) in places else f"leaf {list(leaf.shape)}"
