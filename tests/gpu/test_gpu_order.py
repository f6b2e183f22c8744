"""Same bits in every run, work on the caller's stream, no waiting for the device, and calls in a CUDA graph."""

import pytest
import torch
from operator_calls import CALLS, OPERATORS, assert_same_bits, bits, check_determinism, clones

from ssiuu_fast.ops import Blockwise8, blockwise8, penalty_

pytestmark = pytest.mark.gpu
CALL = pytest.mark.parametrize(("operator", "backend"), CALLS)
# bits of the library are its own matter
OUR_CALL = pytest.mark.parametrize(("operator", "backend"), [call for call in CALLS if call[1] != "library"])
# penalty_ in Triton can't be captured, and says so
CAPTURED = [call for call in CALLS if call[1] != "triton" or "weight_gradient" in call[0]]
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
# about a fifth of a second on a GPU of 2 GHz: longer than any of these calls takes to return
SLEEP_CYCLES = 400_000_000


@pytest.fixture
def refuse_waiting():
    """A function that makes torch raise where the host would wait for the device."""

    def refuse(on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield refuse
    torch.cuda.set_sync_debug_mode("default")


@OUR_CALL
def test_same_bits_in_every_run(device, backend, operator):
    check_determinism(operator, device, backend, 20)


@OUR_CALL
def test_same_bits_beside_a_busy_stream(device, backend, operator):
    other, matrix = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)

    def keep_busy():
        with torch.cuda.stream(other):
            for _ in range(10):
                torch.mm(matrix, matrix)

    torch.cuda.synchronize()
    check_determinism(operator, device, backend, 10, before=keep_busy)
    torch.cuda.synchronize()


@CALL
def test_work_is_ordered_on_the_callers_stream_and_the_call_does_not_wait(device, backend, operator):
    make, run = OPERATORS[operator]
    tensors = make(device, 0)
    expected = bits(run(clones(tensors), backend))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # compiled, loaded, and its memory in this stream's pool
        run(clones(tensors), backend)
        stale = [torch.zeros_like(tensor) for tensor in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for place, tensor in zip(stale, tensors, strict=True):
            place.copy_(tensor)
        outcome = run(stale, backend)
        done = torch.cuda.Event()
        done.record()
        busy = not done.query()
        result = bits(outcome)
    assert busy, "the call returned only after the work before it: it waits for the device"
    stream.synchronize()
    assert_same_bits(result, expected, operator)


@CALL
def test_nothing_waits_for_the_device(device, backend, operator, refuse_waiting):
    make, run = OPERATORS[operator]
    tensors = make(device, 0)
    run(clones(tensors), backend)
    fresh = clones(tensors)
    torch.cuda.synchronize()
    refuse_waiting(True)
    run(fresh, backend)
    refuse_waiting(False)


@BACKENDS
def test_nonfinite_counts_do_not_wait_either(device, backend, refuse_waiting):
    lists = [[torch.randn(1000, device=device) for _ in range(5)] for _ in range(3)]
    counts = torch.full((5,), -1, device=device)
    for on in (False, True):
        lists[0][3][7] = torch.inf
        torch.cuda.synchronize()
        refuse_waiting(on)
        penalty_(*lists, weight=0.5, nonfinite_counts=counts, backend=backend)
        refuse_waiting(False)
    assert counts.tolist() == [0, 0, 0, 1, 0]


def test_8_bit_references_are_encoded_and_decoded_without_waiting(device, refuse_waiting):
    values = torch.randn(100_003, device=device)
    expected = Blockwise8.encode(values).decode()
    torch.cuda.synchronize()
    refuse_waiting(True)
    again = Blockwise8.encode(values).decode()
    refuse_waiting(False)
    assert torch.equal(again, expected)


def test_8_bit_references_in_a_cuda_graph_need_a_call_before(device):
    values = torch.randn(5000, device=device)
    blockwise8._constants_on.cache_clear()
    with pytest.raises(RuntimeError, match="call it once before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        Blockwise8.encode(values)
    expected = Blockwise8.encode(values).decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = Blockwise8.encode(values).decode()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize(("operator", "backend"), CAPTURED)
def test_in_a_cuda_graph(device, operator, backend):
    make, run = OPERATORS[operator]
    static = make(device, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = run(static, backend)
    for seed in range(2, 11, 2):
        fresh = make(device, seed)
        for place, tensor in zip(static, fresh, strict=True):
            place.copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(bits(outcome), bits(run(fresh, backend)), f"{operator}, replay {seed}")
