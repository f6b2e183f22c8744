"""What FSDP2 spreads over ranks: tensors of which each rank holds a part, and the modules that gather them."""

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without the second that importing torch.distributed.tensor takes."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """What of a sharded tensor lies on this rank, the same memory; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    # with gradients enabled it would be a node of a graph
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, each of which must ask; any other tensor is its own."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def from_local_part(parameter: Tensor, part: Tensor) -> Tensor:
    """The tensor, sharded and placed as the parameter is, of which this rank holds this part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def sharded_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of a parameter's shape, equal on all ranks, sharded and placed as the parameter is."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def sharded_along(parameter: Tensor, dimension: int, vector: Tensor) -> Tensor:
    """This rank's part of a vector with an element for each index of a parameter's dimension, equal on all ranks."""
    vector = vector.to(parameter.device)
    if not is_sharded(parameter):
        return vector
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    places = [Shard(0) if placement.is_shard(dimension) else Replicate() for placement in parameter.placements]
    return local_part(distribute_tensor(vector, parameter.device_mesh, places))


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Those that `fully_shard` was applied to; none where the model isn't under FSDP2."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Makes FSDP2 put the shards back, and gather anew, where whole weights outlast a forward pass: those of the root,
    and with reshard_after_forward=False of others. Does nothing to other models."""
    for module in sharded_modules(model):
        module.reshard()
