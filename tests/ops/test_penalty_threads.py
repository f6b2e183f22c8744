"""penalty_ in C++ among threads and processes, and the chunks that a pass is cut into."""

import multiprocessing
import threading

import pytest
import torch
from penalty_cases import Case

from ssiuu_fast import _C
from ssiuu_fast.ops import penalty_


def large_case(seed):
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(size, generator=generator) for size in (300_007, 100_003)] for _ in range(3)]
    return Case(*lists, [None, None], {"weight": 0.5})


def outcome(case):
    run = case.copy()
    result = run.run(penalty_, "cpp")
    return [x.item() for x in result] + [t.sum().item() for t in run.gradients + run.references]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _in_child(queue):
    # torch's own pool doesn't survive a fork: only ours is asked
    torch.set_num_threads(1)
    case = large_case(0)
    kernel_threads, torch.get_num_threads = torch.get_num_threads, lambda: 2
    try:
        queue.put([x.item() for x in case.run(penalty_, "cpp")])
    finally:
        torch.get_num_threads = kernel_threads


def test_after_a_fork():
    expected = [x.item() for x in large_case(0).run(penalty_, "cpp")]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    child.join(60)
    alive = child.is_alive()
    if alive:
        child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    assert queue.get() == expected


def test_concurrent_callers():
    cases = [large_case(seed) for seed in range(4)]
    expected = [outcome(case) for case in cases]
    seen = [[] for _ in cases]

    def work(i):
        for _ in range(10):
            seen[i].append(outcome(cases[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[once] * 10 for once in expected]


def test_subnormals_are_flushed_or_kept_by_all_threads_alike():
    tiny = [torch.full((1_000_003,), value) for value in (-1e-20, 1e-20)]
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            continue
        try:
            outcomes = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                reference = torch.zeros(1_000_003)
                penalty_([tiny[0].clone()], [tiny[1]], [reference], weight=1.0, backend="cpp")
                outcomes.append(reference)
            one, two = (t.view(torch.int32) for t in outcomes)
            assert torch.equal(one, two)
            # compared as integers: flushed, a subnormal equals zero
            assert (one & 0x7FFFFFFF == 0).all() == flush
        finally:
            torch.set_flush_denormal(False)


SIZES = [[], [0], [1], [0, 5, 0], [16_384], [16_385], [100_000, 3, 70_000], [2**31 + 5, 1, 2**33], [2**40, 7]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_chunks_cover_every_element_once(sizes):
    chunks = _C.chunks(sizes)
    # partial sums take 32 bytes a chunk; with this bound they stay far under 1 MB
    assert len(chunks) <= 4096 + len(sizes)
    position = [0] * len(sizes)
    for tensor, begin, end in chunks:
        assert begin == position[tensor] and begin < end <= sizes[tensor]
        position[tensor] = end
    assert position == sizes
    assert chunks == sorted(chunks)
