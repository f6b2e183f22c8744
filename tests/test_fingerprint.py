"""Which frozen weights a run is on: what the fingerprint tells apart, and what it doesn't look at."""

import torch
from tiny import tiny_llama
from torch import nn

from ssiuu_fast.loop.fingerprint import SAMPLE, frozen_fingerprint

# between the elements that are looked at of a tensor of 4 · SAMPLE
UNSEEN = 6


def frozen(*tensors, names=("a", "b")):
    model = nn.Module()
    for name, tensor in zip(names, tensors, strict=False):
        setattr(model, name, nn.Parameter(tensor, requires_grad=False))
    return model


def test_other_values_names_shapes_and_dtypes_are_told_apart():
    values = torch.arange(24.0)
    models = [
        frozen(values),
        frozen(values + 1),
        frozen(-values),
        frozen(values.view(4, 6)),
        frozen(values.view(6, 4)),
        frozen(values.bfloat16()),
        frozen(values.half()),
        frozen(values, names=["c"]),
        frozen(values, values),
        frozen(torch.zeros(0)),
        frozen(torch.tensor(3.0)),
        frozen(torch.tensor(-0.0)),
        frozen(torch.tensor(0.0)),
        frozen(),
    ]
    assert len({frozen_fingerprint(model) for model in models}) == len(models)


def test_what_it_follows_from_and_what_not():
    model = tiny_llama(torch.bfloat16).requires_grad_(False)
    found = frozen_fingerprint(model)
    assert found == frozen_fingerprint(tiny_llama(torch.bfloat16).requires_grad_(False))
    assert found != frozen_fingerprint(tiny_llama(torch.bfloat16, seed=1).requires_grad_(False))
    # a checkpoint holds what is trained
    model.lm_head.weight.requires_grad_(True)
    without = frozen_fingerprint(model)
    model.lm_head.weight.data.zero_()
    assert frozen_fingerprint(model) == without != found


def test_how_a_tensor_lies_in_memory_is_no_matter():
    values = torch.randn(40, 300)
    assert frozen_fingerprint(frozen(values)) == frozen_fingerprint(frozen(values.T.contiguous().T))


def test_a_large_tensor_is_looked_at_here_and_there():
    values = torch.randn(4 * SAMPLE)
    found = frozen_fingerprint(frozen(values))
    for place, seen in ((0, True), (UNSEEN, False), (4 * SAMPLE - 4, True)):
        other = values.clone()
        other[place] += 1
        assert (frozen_fingerprint(frozen(other)) != found) == seen


def test_codes_of_quantised_weights_are_left_out_and_what_is_beside_them_is_not():
    codes, norm = torch.randint(256, (8, 1), dtype=torch.uint8), torch.randn(4)
    found = frozen_fingerprint(frozen(norm, codes))
    # packed anew for another device
    assert frozen_fingerprint(frozen(norm, codes.flip(0).view(2, 4))) == found
    assert frozen_fingerprint(frozen(norm + 1, codes)) != found
    assert frozen_fingerprint(frozen(norm)) != found
