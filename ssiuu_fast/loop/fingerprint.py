"""Which frozen weights a run is on: a checkpoint of adapters doesn't hold them, and must not go on with others."""

import hashlib

import torch
from torch import Tensor, nn

from ssiuu_fast.shards import whole

# elements of a tensor: two models that were trained apart differ in nearly all of them
SAMPLE = 1024


def frozen_fingerprint(model: nn.Module) -> str:
    """sha256 of the parameters that don't require grad: names, shapes, dtypes and every n-th element, SAMPLE at most.

    The same on any number of ranks and any device; of a sharded model every rank must ask. A base that differs in a few
    elements only, between those that are looked at, is not told apart. Of quantised weights there is the name alone:
    their codes are what one device rounded to, and may be packed anew for another. The norms and embeddings beside them
    tell such a base apart.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            tensor = whole(parameter.detach())
            digest.update(f"{name}\n".encode())
            # a quantised tensor has whole numbers, or a class of its own
            if type(tensor.data) is Tensor and tensor.is_floating_point():
                digest.update(f"{list(tensor.shape)} {tensor.dtype}\n".encode() + _sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    elements = tensor.numel()
    count = min(SAMPLE, elements)
    places = torch.arange(count, device=tensor.device) * elements // max(count, 1)
    as_bytes = tensor.reshape(-1).view(torch.uint8).view(elements, tensor.element_size())
    return as_bytes[places].cpu().numpy().tobytes()
