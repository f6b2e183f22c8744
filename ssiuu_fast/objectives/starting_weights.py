"""A few weights as they were at the start, put back for a forward pass: a reference model without a second model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ssiuu_fast.objectives.modules import bare, evaluating, local


class StartingWeights:
    """weights: starting values by name, of a model in which nothing else changes."""

    def __init__(self, weights: dict[str, Tensor]):
        self._weights = dict(weights)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The starting model, in evaluation mode and without gradient; afterwards bit for bit as before.

        Values are exchanged, not tensors: FSDP2 gathers from buffers of its own that the shards are views of.
        """
        now = {}
        with evaluating(model):
            try:
                for name in self._weights:
                    parameter = bare(model).get_parameter(name)
                    values = _values(parameter)
                    now[name] = values.clone()
                    values.copy_(self._placed(name, parameter))
                _forget_gathered(model)
                yield
            finally:
                for name, values in now.items():
                    _values(bare(model).get_parameter(name)).copy_(values)
                _forget_gathered(model)

    def whole(self) -> dict[str, Tensor]:
        """All values, unsharded; where they are sharded every rank must ask."""
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self._weights.items()
        }

    def _placed(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Where the parameter is now, and sharded as it is."""
        start = self._weights[name].to(parameter.device)
        if isinstance(parameter, DTensor) and not isinstance(start, DTensor):
            start = distribute_tensor(start, parameter.device_mesh, parameter.placements)
        self._weights[name] = start
        return local(start)


def _values(parameter: nn.Parameter) -> Tensor:
    # .data: a graph that is alive elsewhere must not take the exchange for a change of its weights
    return local(parameter.detach()).data


def _forget_gathered(model: nn.Module) -> None:
    """Lets FSDP2 gather anew what it may have kept from another forward pass (reshard_after_forward=False)."""
    for module in bare(model).modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
