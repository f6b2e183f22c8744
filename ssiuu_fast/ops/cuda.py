"""The calls of the CUDA kernels. Nothing here waits for the device: work is put on its current stream.

Results and workspaces are torch's memory, allocated on that stream, so that a workspace may be let go of at once and a
captured graph keeps its own.
"""

import torch
from torch import Tensor

from ssiuu_fast.ops import addresses, backends


def penalty(gradients, parameters, references, outs, options):
    """Return penalty, negative, gradient_square and the non-finite count of each tensor; all on one device."""
    device = gradients[0].device
    index, stream = addresses.launch_place(device)
    with torch.cuda.device_of(gradients[0]):
        workspace = _bytes(backends._C.cuda_penalty_workspace(len(gradients), index), device)
        floats = torch.empty(2, dtype=torch.float64, device=device)
        negative = torch.empty((), dtype=torch.int64, device=device)
        counts = torch.empty(len(gradients), dtype=torch.int64, device=device)
        backends._C.cuda_penalty(
            addresses.penalty_table(gradients, parameters, references, outs),
            *_weight(options.weight),
            options.gradient_scale,
            options.one_sided,
            options.update_references,
            options.first,
            *(tensor.data_ptr() for tensor in (workspace, floats, negative, counts)),
            index,
            stream,
        )
    return floats[0], negative, floats[1], counts


def neuron_attribution(hidden, gradient, mask):
    """Return max, min and sum over tokens, [batch, neurons] in float32; mask in bytes or None."""
    batch, _, neurons = hidden.shape
    index, stream = addresses.launch_place(hidden.device)
    with torch.cuda.device_of(hidden):
        numbers = addresses.neuron_numbers(hidden, gradient, mask)
        workspace = _bytes(backends._C.cuda_neuron_attribution_workspace(numbers, index), hidden.device)
        results = [torch.empty(batch, neurons, device=hidden.device, dtype=torch.float32) for _ in range(3)]
        written = (tensor.data_ptr() for tensor in (*results, workspace))
        backends._C.cuda_neuron_attribution(numbers, *written, index, stream)
    return results


def neuron_penalty(hidden, gradient, reference, mask, weight, attribution, per_sample, one_sided):
    """Overwrite gradient with the injection, fill attribution, return penalty and negative; mask in bytes or None."""
    device = hidden.device
    index, stream = addresses.launch_place(device)
    with torch.cuda.device_of(hidden):
        numbers = addresses.neuron_numbers(hidden, gradient, mask)
        workspace = _bytes(backends._C.cuda_neuron_penalty_workspace(numbers, per_sample, index), device)
        floats = torch.empty(2, dtype=torch.float64, device=device)
        negative = torch.empty((), dtype=torch.int64, device=device)
        backends._C.cuda_neuron_penalty(
            numbers,
            addresses.address(reference),
            attribution.data_ptr(),
            *_weight(weight),
            per_sample,
            one_sided,
            *(tensor.data_ptr() for tensor in (workspace, floats, negative)),
            index,
            stream,
        )
    return floats[0], negative


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _weight(weight: float | Tensor) -> tuple[float, int]:
    """The weight as a number, or the address that holds it."""
    return (0.0, weight.data_ptr()) if isinstance(weight, Tensor) else (weight, 0)
