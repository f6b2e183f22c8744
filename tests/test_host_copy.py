"""What is read a step later: on the CPU at once, and what a GPU would do played by stand-ins."""

import pytest
import torch
from torch import nn

from ssiuu_fast import SSIUURegularizer, host_copy
from ssiuu_fast.host_copy import HostCopy
from ssiuu_fast.step import NonfiniteWatch


class OnDevice:
    """A tensor of a device whose work is done only when its event is waited for."""

    device = torch.device("cuda", 0)

    def __init__(self, values):
        self.values = torch.tensor(values)


class Event:
    def __init__(self, log):
        self.log = log

    def synchronize(self):
        self.log.append("waited")


@pytest.fixture
def log(monkeypatch):
    log = []
    monkeypatch.setattr(host_copy, "_pinned", lambda tensor: log.append("copied") or tensor.values)
    monkeypatch.setattr(host_copy, "_event", lambda device: log.append("recorded") or Event(log))
    return log


def test_from_a_gpu_the_copy_starts_at_once_and_is_waited_for_when_read(log):
    copy = HostCopy(OnDevice([3, 0]))
    # the event stands behind the copy
    assert log == ["copied", "recorded"]
    assert copy.read() == [3, 0]
    assert log == ["copied", "recorded", "waited"]


def test_elsewhere_nothing_is_copied(log):
    assert HostCopy(torch.tensor([1, 2])).read() == [1, 2]
    assert log == []


def test_counts_are_looked_at_once(log):
    watch = NonfiniteWatch()
    watch.check()
    watch.expect(["a", "b"], OnDevice([0, 0]))
    watch.check()
    watch.expect(["a", "b"], OnDevice([0, 2]))
    assert log.count("waited") == 1
    with pytest.raises(FloatingPointError, match=r"non-finite attributions in b \(2\): those .* was probably taken"):
        watch.check()
    watch.check()
    watch.expect(["a"], torch.tensor([1]))
    with pytest.raises(FloatingPointError, match="Don't take this step"):
        watch.check()


def test_the_regulariser_raises_at_the_next_look(monkeypatch):
    weight = nn.Parameter(torch.full((3,), -1.0))
    for look in (lambda r: r.last_step, lambda r: r.backward(weight.sum().reshape(1)), lambda r: r.state_dict()):
        regularizer = SSIUURegularizer([("w", weight)])
        regularizer.backward(weight.sum().reshape(1))
        # as if a GPU had counted one in that step
        regularizer._nonfinite.expect(["w"], torch.tensor([1]))
        with pytest.raises(FloatingPointError, match=r"w \(1\)"):
            look(regularizer)
        assert regularizer.last_step is not None
