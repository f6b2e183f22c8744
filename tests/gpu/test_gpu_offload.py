"""References in host memory: the bits of ordinary ones while copies really overlap, and what the device then holds."""

import gc
from dataclasses import dataclass, field

import pytest
import torch
from test_gpu_regularizer import take_steps_without_waiting
from tiny import batch, log_probs_of, tiny_llama

from ssiuu_fast import SSIUURegularizer, host_references
from ssiuu_fast.ops.blockwise8 import tensors_of

pytestmark = pytest.mark.gpu
STEPS = 4
# matrices of 4 and 16 MiB in fp32: their copies take as long as a few kernels
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
ROADS = pytest.mark.parametrize("one_backward", [True, False], ids=["one backward", "two backwards"])
DTYPES = pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"], ids=str)
LOADS = pytest.mark.parametrize("load", [32 * 2**20, 1], ids=["some together", "one by one"])


def made(device):
    # eager attention has one order of sums
    model = tiny_llama(torch.float32, attn_implementation="eager", **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.1)
    return model.to(device)


@dataclass
class Run:
    """gradients: of each step. held, peak: bytes on the device at the end and at most, beside the weights. sizes: bytes
    of each reference."""

    references: dict
    penalties: list
    gradients: list = field(default_factory=list)
    held: int = 0
    peak: int = 0
    sizes: list = field(default_factory=list)


def run(device, one_backward, offload, state_dtype, micro_batches=2, keep=True, **options):
    """keep: the gradients too."""
    on_gpu = device.type == "cuda"
    model = made(device)
    regularizer = SSIUURegularizer(
        model, 1.0, target="log_probability", offload=offload, state_dtype=state_dtype, **options
    )
    weights = torch.arange(1, 5, device=device)
    # sent there beforehand: nothing is waited for between two steps
    rows = [
        [{n: t.to(device) for n, t in batch(4, seed=10 * step + part).items()} for part in range(micro_batches)]
        for step in range(STEPS)
    ]
    found = Run({}, [])
    if on_gpu:
        # what an earlier run has left
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for parts in rows:
        model.zero_grad()
        for index, part in enumerate(parts):
            log_probs = log_probs_of(model, part)
            loss, last = (log_probs * weights).sum() / 9, index == micro_batches - 1
            if one_backward:
                penalty = regularizer.backward(log_probs, last=last, loss=loss)
                assert regularizer.road == "one backward"
            else:
                penalty = regularizer.backward(log_probs, last=last)
                loss.backward()
        found.penalties.append(penalty)
        if keep:
            found.gradients.append([p.grad.clone() for p in regularizer.regularized_parameters])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
    found.references = regularizer.state_dict()["references"]
    if offload:
        assert all(tensor.device.type == "cpu" for tensor in found.references.values())
        assert not on_gpu or all(tensor.is_pinned() for tensor in found.references.values())
    del log_probs, loss
    if on_gpu:
        torch.cuda.synchronize()
        found.held = torch.cuda.memory_allocated() - before
        found.peak = torch.cuda.max_memory_allocated() - before
    kept = regularizer._grain._references.tensors.values()
    found.sizes = [sum(tensor.nbytes for tensor in tensors_of(reference)) for reference in kept]
    return found


def assert_same(ours, theirs, rel):
    for step, (one, other) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        for number, (gradient, expected) in enumerate(zip(one, other, strict=True)):
            assert gradient.equal(expected), f"step {step}, parameter {number}"
    for name, reference in theirs.references.items():
        assert ours.references[name].equal(reference.cpu()), name
    penalties = [[penalty.item() for penalty in some.penalties] for some in (ours, theirs)]
    assert penalties[0] == pytest.approx(penalties[1], rel=rel, abs=0)
    assert penalties[0][-1] > 0


@ROADS
@DTYPES
@LOADS
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_same_bits(device, one_backward, state_dtype, load, micro_batches, monkeypatch, poisoned_memory):
    monkeypatch.setattr(host_references, "LOAD", load)
    ours, theirs = (run(device, one_backward, offload, state_dtype, micro_batches) for offload in (True, False))
    assert_same(ours, theirs, 0 if one_backward else 1e-12)


@ROADS
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_initial_references(device, one_backward, poisoned_memory):
    ours, theirs = (run(device, one_backward, offload, "8bit", reference="initial") for offload in (True, False))
    assert_same(ours, theirs, 0 if one_backward else 1e-12)


@ROADS
@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"], ids=str)
def test_what_the_device_holds(device, one_backward, state_dtype, monkeypatch):
    monkeypatch.setattr(host_references, "LOAD", 1)
    # what is compiled and loaded stays
    run(device, one_backward, True, state_dtype, keep=False)
    ours, theirs = (run(device, one_backward, offload, state_dtype, keep=False) for offload in (True, False))
    slots = host_references.SLOTS * (max(theirs.sizes) + 1024)
    # the allocator doesn't split what is less than 1 MiB larger
    saved = sum(theirs.sizes) - slots - 2**20 * len(theirs.sizes)
    assert saved > 0
    for what in ("held", "peak"):
        with_all, with_few = getattr(theirs, what), getattr(ours, what)
        assert with_all - with_few >= saved, f"{what}: {with_all:,} bytes with all references, {with_few:,} with few"


@DTYPES
def test_backward_does_not_wait_for_the_device(device, state_dtype):
    model = tiny_llama(torch.float32).to(device)
    regularizer = SSIUURegularizer(model, 1e6, state_dtype=state_dtype, offload=True)
    take_steps_without_waiting(model, regularizer, device)


def test_dropped_while_copies_are_under_way(device):
    """The allocator doesn't give away what a copy still reads or writes."""
    model = made(device)
    rows = {name: tensor.to(device) for name, tensor in batch(4).items()}
    for _ in range(3):
        regularizer = SSIUURegularizer(model, 1.0, target="log_probability", offload=True)
        for _ in range(3):
            log_probs = log_probs_of(model, rows)
            regularizer.backward(log_probs, loss=(log_probs * torch.arange(1, 5, device=device)).sum())
        # copies of this step are still under way
        del regularizer
        taken = [torch.full((4 * 2**20,), 3.0, device=device) for _ in range(64)]
        assert all((tensor == 3.0).all() for tensor in taken)
        del taken
