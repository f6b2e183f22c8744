"""References that are kept in host memory, of which a few at a time are on the device."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ssiuu_fast.copy_lanes import Event, Lanes, lanes_of, pinned_like
from ssiuu_fast.ops.blockwise8 import Blockwise8, tensors_of
from ssiuu_fast.references import Reference, References, StateDtype, empty_references
from ssiuu_fast.selection import NamedParameters

# places on the device: one at work, one on its way back, two on their way in, as gradients come in bursts
SLOTS = 4
# bytes of what travels together where many are asked for at once: a millisecond of PCIe, and a launch is far less
LOAD = 32 * 2**20
# of a slot's tensors, as the allocator aligns its own
_ALIGNMENT = 512

# the parameters whose references travel together
Load = tuple[str, ...]


def slot_size(sizes: Sequence[int]) -> int:
    """Bytes of each of the SLOTS on a device, for references that take these bytes there (`place_size`)."""
    return max([*sizes, min(LOAD, sum(sizes))])


def place_size(tensors: Iterable[int]) -> int:
    """Bytes that a reference takes in a slot, from those of its tensors."""
    return sum(map(_aligned, tensors))


def pinned_size(tensors: Iterable[int]) -> int:
    """Bytes that a reference takes in pinned host memory, whose allocator takes a power of two for each tensor."""
    return sum(1 << (size - 1).bit_length() for size in tensors)


class HostReferences(References):
    """References in host memory (pinned for CUDA), with the bits of ordinary ones.

    A pass has them brought to slots on the device in loads, and sent back once they are renewed, beside the
    computation: what came next in the pass before is under way when it is asked for. The slots, each as large as the
    largest reference, or LOAD if that is more, stay. References of parameters on the CPU are ordinary.
    """

    def __init__(self, tensors: dict[str, Reference], samples: int | None, devices: dict[str, torch.device]):
        super().__init__(tensors, samples)
        self._shuttles: list[Shuttle] = []
        self._shuttle_of: dict[str, Shuttle] = {}
        for device in dict.fromkeys(devices.values()):
            lanes = lanes_of(device)
            if lanes is not None:
                there = {name: tensor for name, tensor in tensors.items() if devices[name] == device}
                self._shuttles.append(Shuttle(there, lanes))
                self._shuttle_of |= dict.fromkeys(there, self._shuttles[-1])

    @classmethod
    def empty(cls, parameters: NamedParameters, dtype: StateDtype, samples: int | None) -> "HostReferences":
        devices = {name: parameter.device for name, parameter in parameters.items()}
        shapes = empty_references({name: p.detach().to("meta") for name, p in parameters.items()}, dtype)
        tensors = {
            name: _like(shape, [pinned_like(tensor, devices[name]) for tensor in tensors_of(shape)])
            for name, shape in shapes.items()
        }
        return cls(tensors, samples, devices)

    def at_rest(self, names: Collection[str]) -> dict[str, Reference]:
        for shuttle in self._shuttles:
            shuttle.rest(names)
        return super().at_rest(names)

    def bring(self, names: Sequence[str], *, empty: bool) -> Iterator[tuple[Sequence[str], list[Reference]]]:
        there: dict[Shuttle | None, list[str]] = {}
        for name in names:
            there.setdefault(self._shuttle_of.get(name), []).append(name)
        for shuttle, some in there.items():
            yield from (super() if shuttle is None else shuttle).bring(some, empty=empty)

    def renewed(self, names: Sequence[str]) -> None:
        super().renewed(names)
        shuttle = self._shuttle_of.get(names[0])
        if shuttle is not None:
            shuttle.send_back(tuple(names))

    def follow(self, samples: int) -> None:
        # where every pass begins
        for shuttle in self._shuttles:
            shuttle.begin()
        super().follow(samples)


@dataclass
class _Slot:
    """Bytes on the device; last: the last that was done to them, which whatever comes next has to await."""

    buffer: Tensor
    last: Event


class Shuttle:
    """Carries the references of one device's parameters to its slots and back.

    Each device has its own: autograd runs the hooks of different devices in different threads.
    """

    def __init__(self, references: dict[str, Reference], lanes: Lanes):
        self._host = references
        self._lanes = lanes
        self._sizes = {name: _size(reference) for name, reference in references.items()}
        self._slot_size = slot_size(list(self._sizes.values()))
        self._slots = 0
        self._idle: deque[_Slot] = deque()
        self._at_work: dict[Load, _Slot] = {}
        # on their way in, or there and not yet asked for
        self._ahead: dict[Load, _Slot] = {}
        # the last copy from or to each host tensor
        self._copies: dict[str, Event] = {}
        # what was asked for in this pass and in the one before, with its place in the order
        self._asked: dict[Load, int] = {}
        self._asked_before: list[Load] = []
        self._place_before: dict[Load, int] = {}

    def begin(self) -> None:
        """A new pass. What one that was broken off has left is given up."""
        if self._asked:
            self._asked_before, self._place_before = list(self._asked), self._asked
        self._asked = {}
        for load in list(self._at_work):
            self._put_away(load)
        self._idle += self._ahead.values()
        self._ahead = {}

    def bring(self, names: Sequence[str], *, empty: bool) -> Iterator[tuple[Load, list[Reference]]]:
        for load in self._loads(names):
            slot = self._ahead.pop(load, None)
            if slot is None:
                slot = self._free_slot()
                if not empty:
                    self._send_in(load, slot)
            self._at_work[load] = slot
            self._asked[load] = len(self._asked)
            self._lanes.hold(slot.buffer, slot.last)
            self._look_ahead(load)
            yield load, self._views(load, slot)
            if load in self._at_work:
                self._put_away(load)

    def send_back(self, load: Load) -> None:
        """To the host tensors, once the computation is done with what it was given up to now."""
        slot = self._at_work.pop(load)
        copied = self._lanes.copy_out(
            [(host, there) for there, host in self._pairs(load, slot)], [self._lanes.mark(), *self._copies_of(load)]
        )
        slot.last = copied
        self._copies |= dict.fromkeys(load, copied)
        self._idle.append(slot)

    def rest(self, names: Collection[str]) -> None:
        """Waits until no copy reads or writes the host tensors of these names; they may then change."""
        names = self._host.keys() & set(names)
        for load in [load for load in self._ahead if not names.isdisjoint(load)]:
            self._idle.append(self._ahead.pop(load))
        for name in names:
            event = self._copies.pop(name, None)
            if event is not None:
                self._lanes.wait(event)

    def _loads(self, names: Sequence[str]) -> list[Load]:
        """The names in order, as many together as a slot may hold."""
        loads, size = [], 0
        for name in names:
            size += self._sizes[name]
            if loads and size <= min(LOAD, self._slot_size):
                loads[-1].append(name)
            else:
                loads.append([name])
                size = self._sizes[name]
        return [tuple(load) for load in loads]

    def _look_ahead(self, load: Load) -> None:
        """Sends in what came after this load in the pass before, as far as there is room."""
        place = self._place_before.get(load, len(self._asked_before))
        for coming in islice(self._asked_before, place + 1, None):
            if not self._idle and self._slots == SLOTS:
                return
            if coming not in self._ahead and coming not in self._asked:
                self._ahead[coming] = self._free_slot()
                self._send_in(coming, self._ahead[coming])

    def _free_slot(self) -> _Slot:
        if self._slots < SLOTS:
            self._slots += 1
            return _Slot(self._lanes.buffer(self._slot_size), self._lanes.mark())
        if self._idle:
            return self._idle.popleft()
        # of what was expected, that which was expected last
        return self._ahead.popitem()[1]

    def _send_in(self, load: Load, slot: _Slot) -> None:
        slot.last = self._lanes.copy_in(self._pairs(load, slot), [slot.last, *self._copies_of(load)])
        self._copies |= dict.fromkeys(load, slot.last)

    def _put_away(self, load: Load) -> None:
        slot = self._at_work.pop(load)
        slot.last = self._lanes.mark()
        self._idle.append(slot)

    def _copies_of(self, load: Load) -> list[Event]:
        return [self._copies[name] for name in load if name in self._copies]

    def _pairs(self, load: Load, slot: _Slot) -> list[tuple[Tensor, Tensor]]:
        """Each tensor in the slot, with that in host memory."""
        views = (tensor for view in self._views(load, slot) for tensor in tensors_of(view))
        host = (tensor for name in load for tensor in tensors_of(self._host[name]))
        return list(zip(views, host, strict=True))

    def _views(self, load: Load, slot: _Slot) -> list[Reference]:
        """The load's references, in the slot."""
        views, start = [], 0
        for name in load:
            pieces = []
            for tensor in tensors_of(self._host[name]):
                pieces.append(slot.buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
                start += _aligned(tensor.nbytes)
            views.append(_like(self._host[name], pieces))
        return views


def _like(reference: Reference, tensors: Sequence[Tensor]) -> Reference:
    """One of the same kind, made of other tensors."""
    return Blockwise8(*tensors) if isinstance(reference, Blockwise8) else tensors[0]


def _size(reference: Reference) -> int:
    return place_size(tensor.nbytes for tensor in tensors_of(reference))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
