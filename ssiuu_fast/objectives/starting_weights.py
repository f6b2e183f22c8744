"""A few weights as they were at the start, put back for a forward pass: a reference model without a second model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ssiuu_fast.engines import bare
from ssiuu_fast.evaluation.forwards import evaluating
from ssiuu_fast.shards import local_part, reshard, sharded_as, whole


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
            reshard(model)
            try:
                for name in self._weights:
                    parameter = bare(model).get_parameter(name)
                    values = _values(parameter)
                    now[name] = values.clone()
                    values.copy_(self._placed(name, parameter))
                yield
            finally:
                reshard(model)
                for name, values in now.items():
                    _values(bare(model).get_parameter(name)).copy_(values)

    def whole(self) -> dict[str, Tensor]:
        """All values, unsharded; where they are sharded every rank must ask."""
        return {name: whole(tensor) for name, tensor in self._weights.items()}

    def _placed(self, name: str, parameter: nn.Parameter) -> Tensor:
        """This rank's part, where the parameter is now."""
        self._weights[name] = sharded_as(parameter, self._weights[name])
        return local_part(self._weights[name])


def _values(parameter: nn.Parameter) -> Tensor:
    # .data: a graph that is alive elsewhere must not take the exchange for a change of its weights
    return local_part(parameter.detach()).data
