"""Small tensors on their way between a device and the host, which waits for nothing."""

import torch
from torch import Tensor


class HostCopy:
    """A copy that is asked for now and looked at later: the host waits for nothing in between.

    From a GPU the values go to pinned memory behind what is already enqueued, and `read` waits for that copy alone.
    Elsewhere the tensor itself is kept.
    """

    def __init__(self, tensor: Tensor):
        self._host, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._host, self._arrived = _pinned(tensor), _event(tensor.device)

    @property
    def from_gpu(self) -> bool:
        return self._arrived is not None

    def read(self) -> list:
        """The values, as `Tensor.tolist` gives them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def to_device(values: list, device: torch.device) -> Tensor:
    """The values as a tensor there; to a GPU they go from pinned memory, behind what is already enqueued."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _pinned(tensor):
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _event(device):
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
