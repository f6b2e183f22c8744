"""What the host does before a launch: rows, chunks and splits, for sizes that no test could allocate."""

import pytest
import torch

from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.ops.addresses import penalty_table
from ssiuu_fast.ops.checks import BLOCKWISE8_CODE, DTYPE_CODES

CHUNK = 4096
F32, BF16 = DTYPE_CODES[torch.float32], DTYPE_CODES[torch.bfloat16]


def row(size, gradient=0x1000, parameter=0x2000, reference=0x3000, out=0, codes=(BF16, BF16, BF16, 0), absmax=0):
    return [gradient, parameter, reference, out, size, *codes, absmax]


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [0, 5, 0], [CHUNK], [CHUNK + 1], [100_000, 3, 70_000], [2**31 + 5, 1, 2**33], [2**40, 7]],
    ids=str,
)
def test_chunks_are_counted_in_64_bits(emulated, sizes):
    rows, chunks = emulated.cuda_penalty_rows([number for size in sizes for number in row(size)])
    counts = [-(-size // CHUNK) for size in sizes]
    assert [first for first, _ in rows] == [sum(counts[:i]) for i in range(len(sizes))]
    assert chunks == sum(counts)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ({}, True),
        ({"gradient": 0x1002}, False),
        ({"parameter": 0x2008}, False),
        ({"reference": 0x3002}, False),
        ({"out": 0x4004, "codes": (BF16, BF16, BF16, F32)}, False),
        ({"out": 0x4010, "codes": (BF16, BF16, BF16, F32)}, True),
        # eight codes are one access of eight bytes
        ({"reference": 0x3008, "codes": (BF16, BF16, BLOCKWISE8_CODE, 0), "absmax": 0x5004}, True),
        ({"reference": 0x3004, "codes": (BF16, BF16, BLOCKWISE8_CODE, 0), "absmax": 0x5000}, False),
    ],
    ids=str,
)
def test_wide_accesses_only_where_every_buffer_is_aligned(emulated, address, expected):
    ((_, aligned),), _ = emulated.cuda_penalty_rows(row(10_000, **address))
    assert aligned == expected


def test_a_table_of_the_wrong_length_is_refused(emulated):
    with pytest.raises(ValueError, match="ten numbers a tensor"):
        emulated.cuda_penalty_rows([1, 2, 3])


def test_the_table_tells_every_dtype():
    for dtype, code in DTYPE_CODES.items():
        tensors = [torch.zeros(3, dtype=dtype) for _ in range(3)]
        table = penalty_table(*([tensor] for tensor in tensors), [None])
        assert table == [*(t.data_ptr() for t in tensors), 0, 3, code, code, code, 0, 0]
    gradient, out = torch.zeros(3, dtype=torch.float16), torch.zeros(3)
    reference = Blockwise8.empty_like(gradient)
    table = penalty_table([gradient], [gradient], [reference], [out])
    assert table[2:5] == [reference.codes.data_ptr(), out.data_ptr(), 3]
    assert table[5:] == [2, 2, BLOCKWISE8_CODE, 0, reference.absmax.data_ptr()]


def neurons(batch, tokens, neurons):
    return [0x1000, 0x2000, 0, batch, tokens, neurons, *(tokens * neurons, neurons) * 2, BF16]


@pytest.mark.parametrize("shape", [(16, 512, 8192), (1, 32_768, 1024), (1, 1, 1), (3, 0, 5), (0, 7, 3), (1, 2**20, 64)])
@pytest.mark.parametrize("resident", [1, 264, 10_000])
def test_splits_cover_every_token_and_stay_small(emulated, shape, resident):
    batch, tokens, width = shape
    count, length = emulated.cuda_token_splits(neurons(*shape), resident)
    assert count * length >= tokens and (count - 1) * length <= max(0, tokens - 1)
    if count > 1:
        partial_bytes = count * batch * width * 16
        assert partial_bytes <= 0.01 * 2 * 2 * batch * tokens * width
    tiles = -(-width // 256) * batch
    # never more blocks than asked for, but for the last tiles' share
    assert count == 1 or (count - 1) * tiles < resident


def test_a_long_narrow_input_fills_the_device(emulated):
    count, _ = emulated.cuda_token_splits(neurons(1, 32_768, 1024), 264)
    assert count * 4 >= 250


def test_the_workspace_is_the_table_and_a_partial_sum_a_block(emulated):
    # three multiprocessors of one block each
    assert emulated.cuda_penalty_workspace(0, 0) == 3 * 24
    assert emulated.cuda_penalty_workspace(3000, 0) == 3000 * 64 + 3 * 24
