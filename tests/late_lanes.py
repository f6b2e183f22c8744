"""A stand-in for a device's streams on the CPU: copies happen as late as the waits allow, and races are found."""

from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Work:
    """Something that was given to a lane. before: a bit for each work that is over when this begins."""

    number: int
    what: str
    reads: set[int]
    writes: set[int]
    before: int
    pairs: tuple = ()
    after: tuple = ()
    previous: "Work | None" = None
    done: bool = False

    def run(self):
        if self.done:
            return
        if self.previous is not None:
            self.previous.run()
        for other in self.after:
            other.run()
        for target, source in self.pairs:
            target.copy_(source)
        self.done = True


def place(tensor):
    return tensor.untyped_storage().data_ptr()


class LateLanes:
    """Lanes of copy_lanes.py. The computation runs when it is given, as ever on the CPU; a copy when somebody waits
    for it, or for what comes after it. `check` sees to it that no two works on the same memory may overlap, wherever
    the lanes take the time they like."""

    def __init__(self):
        self.buffers = []
        self.works = []
        self._last = dict.fromkeys(("compute", "in", "out"))
        # what the host has waited for comes before all that it gives from then on
        self._host = 0

    def buffer(self, size):
        # what isn't written is NaN, or the largest code
        self.buffers.append(torch.full((size,), 255, dtype=torch.uint8))
        return self.buffers[-1]

    def mark(self):
        return self._add("compute", "mark")

    def copy_in(self, pairs, after):
        return self._copy("in", pairs, after)

    def copy_out(self, pairs, after):
        return self._copy("out", pairs, after)

    def hold(self, buffer, event):
        event.run()
        self._add("compute", "hold", after=[event])

    def wait(self, event):
        event.run()
        self._host |= event.before | 1 << event.number

    def use(self, tensors):
        """The computation reads and writes them, if they are of this device."""
        mine = {place(tensor) for tensor in tensors} & {place(buffer) for buffer in self.buffers}
        if mine:
            self._add("compute", "use", reads=mine, writes=mine)

    def touch(self, tensors):
        """The host reads and writes them: not a work of any lane, but none may be at them."""
        places = {place(tensor) for tensor in tensors}
        for work in self.works:
            if places & (work.reads | work.writes):
                assert self._host >> work.number & 1, f"the host did not wait for {work.what} {work.number}"

    def count(self, what):
        return sum(work.what == what for work in self.works)

    def check(self):
        for work in self.works:
            for other in self.works[: work.number]:
                shared = (other.writes & (work.reads | work.writes)) | (other.reads & work.writes)
                if shared:
                    assert work.before >> other.number & 1, (
                        f"{work.what} {work.number} may overlap {other.what} {other.number}"
                    )

    def _copy(self, lane, pairs, after):
        targets, sources = ({place(tensor) for tensor in some} for some in zip(*pairs, strict=True))
        return self._add(lane, lane, after, reads=sources, writes=targets, pairs=tuple(pairs))

    def _add(self, lane, what, after=(), reads=(), writes=(), pairs=()):
        previous = self._last[lane]
        before = self._host
        for other in (*after, *([] if previous is None else [previous])):
            before |= other.before | 1 << other.number
        work = Work(len(self.works), what, set(reads), set(writes), before, pairs, tuple(after), previous)
        if lane == "compute":
            work.run()
        self.works.append(work)
        self._last[lane] = work
        return work
