"""8-bit references: the map, its codes, and penalty_ with them."""

from fractions import Fraction

import pytest
import torch
from penalty_cases import copied

from ssiuu_fast import _C
from ssiuu_fast.ops import Blockwise8, blockwise8, penalty_
from ssiuu_fast.ops.blockwise8 import LIMIT, VALUES

BACKENDS = ["reference", "cpp"]
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def restore():
    yield
    torch.set_num_threads(THREADS)
    _C.use_cpu_unit(_C.cpu_units()[-1])


def exact_values():
    values = {0: Fraction(0), 128: Fraction(1)}
    for i in range(7):
        for j in range(2**i):
            share = Fraction(1, 10) + Fraction(9, 10) * (j + Fraction(1, 2)) / 2**i
            values[2**i + j] = Fraction(10) ** (i - 6) * share
            values[128 + 2**i + j] = -values[2**i + j]
    return [values[code] for code in range(256)]


def encoded_by(backend, values):
    """Stores A = φ · 1 = values as references in 8 bits."""
    reference = Blockwise8.empty_like(values)
    penalty_([torch.ones_like(values)], [values], [reference], weight=1.0, first=True, backend=backend)
    return reference


def test_the_map_is_rounded_correctly():
    exact = exact_values()
    assert len(set(exact)) == 256
    for value, number in zip(exact, VALUES, strict=True):
        distance = abs(Fraction(number.item()) - value)
        for towards in (-2.0, 2.0):
            neighbour = torch.nextafter(number, torch.tensor(towards)).item()
            assert distance <= abs(Fraction(neighbour) - value)


@pytest.mark.parametrize("unit", _C.cpu_units())
def test_cpp_has_the_same_map(unit):
    _C.use_cpu_unit(unit)
    reference = Blockwise8(torch.arange(256, dtype=torch.uint8), torch.ones(1))
    # A = −1e-30, next to which every other value stays what it is: d = A − A^ref = −A^ref, and −d is written
    gradient, parameter = torch.full((256,), -1.0), torch.full((256,), 1e-30)
    penalty_([gradient], [parameter], [reference], weight=0.5, update_references=False, backend="cpp")
    assert torch.equal(gradient[1:], VALUES[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_five_values_by_hand(backend):
    # absmax 2: shares 1, −0.25, 0.00025, −1e-9, 0
    reference = encoded_by(backend, torch.tensor([2.0, -0.5, 5e-4, -2e-9, 0.0]))
    # 0.25 = 0.1 + 0.9 · (10⅔)/64 lies in group 6, place 10; 2.5e-4 = 1e-3 · (0.1 + 0.9 · (1⅓)/8) in group 3, place 1
    assert reference.codes.tolist() == [128, 128 + 64 + 10, 8 + 1, 0, 0]
    assert reference.absmax.tolist() == [2.0]
    values = [2, -2 * (0.1 + 0.9 * 10.5 / 64), 2e-3 * (0.1 + 0.9 * 1.5 / 8), 0, 0]
    torch.testing.assert_close(reference.decode(), torch.tensor(values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_value_of_the_map_gets_its_own_code(backend):
    reference = encoded_by(backend, VALUES)
    assert reference.codes.tolist() == list(range(256))
    assert torch.equal(reference.decode(), VALUES)


def around_the_midpoints():
    ordered = sorted(map(float, exact_values()))
    middle = torch.tensor([(a + b) / 2 for a, b in zip(ordered, ordered[1:], strict=False)])
    up, down = middle, middle
    near = [middle]
    for _ in range(3):
        up, down = torch.nextafter(up, torch.tensor(2.0)), torch.nextafter(down, torch.tensor(-2.0))
        near += [up, down]
    return torch.cat(near)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_nearest_value_by_brute_force(backend):
    generator = torch.Generator().manual_seed(0)
    shares = torch.cat(
        [
            around_the_midpoints(),
            torch.rand(20_000, generator=generator) * 2 - 1,
            10 ** (torch.rand(20_000, generator=generator) * 8 - 8),
            -(10 ** (torch.rand(20_000, generator=generator) * 8 - 8)),
        ]
    )
    blocks = torch.zeros(-(-len(shares) // 255), 256)
    blocks[:, 0] = 1.0
    blocks[:, 1:].copy_(torch.nn.functional.pad(shares, (0, -len(shares) % 255)).view(-1, 255))
    for absmax in (1.0, 0.37, 3e-30, 2.0**100):
        values = (blocks * absmax).view(-1)
        reference = encoded_by(backend, values)
        scale = reference.absmax.double().repeat_interleave(256)
        exact = torch.tensor([float(value) for value in exact_values()], dtype=torch.float64)
        relative = values.double() / scale
        distances = (relative[:, None] - exact).abs()
        chosen = distances.gather(1, reference.codes.long()[:, None])[:, 0]
        # at a midpoint fp32 may fall to either side
        assert (chosen <= 1.0001 * distances.amin(1)).all()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 5000])
def test_sizes_and_the_bits_of_every_backend(size):
    generator = torch.Generator().manual_seed(size)
    exponents = 12 * torch.rand(size, generator=generator) - 10
    values = torch.randn(size, generator=generator) * 10**exponents
    plain = Blockwise8.encode(values)
    assert plain.shape == values.shape and plain.numel() == size and plain.device == values.device
    assert plain.absmax.shape == (-(-size // 256),)
    assert torch.equal(
        plain.absmax, torch.stack([b.abs().max() for b in values.split(256)]) if size else torch.empty(0)
    )
    for unit in _C.cpu_units():
        _C.use_cpu_unit(unit)
        kernel = encoded_by("cpp", values)
        assert torch.equal(kernel.codes, plain.codes) and torch.equal(kernel.absmax, plain.absmax)
    stride = 7
    assert torch.equal(plain.decode_strided(stride), plain.decode()[::stride])


def test_constants_are_sent_to_a_device_once(monkeypatch):
    blockwise8._constants_on.cache_clear()
    values = torch.randn(300)
    first = Blockwise8.encode(values)

    def refuse(*arguments, **options):
        raise AssertionError("a constant was made again")

    monkeypatch.setattr(torch, "tensor", refuse)
    again = Blockwise8.encode(values)
    assert torch.equal(again.codes, first.codes) and torch.equal(again.decode(), first.decode())


def test_constants_are_not_sent_while_a_graph_is_captured(monkeypatch):
    blockwise8._constants_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="on cuda:0 for the first time while .* call it once before the capture"):
        blockwise8.values_on(torch.device("cuda", 0))
    # the CPU captures nothing
    assert torch.equal(blockwise8.values_on(torch.device("cpu")), VALUES)


def test_shape_and_bytes():
    encoded = Blockwise8.encode(torch.randn(64, 96, dtype=torch.bfloat16))
    assert encoded.codes.shape == encoded.decode().shape == (64, 96)
    assert encoded.decode().dtype == torch.float32
    assert (encoded.codes.nbytes + encoded.absmax.nbytes) / encoded.numel() == 1 + 4 / 256
    encoded.zero_()
    assert not encoded.decode().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_and_the_largest_blocks(backend):
    tiny = torch.finfo(torch.float32).tiny
    values = torch.zeros(3, 256)
    values[0, :2] = torch.tensor([tiny / 2, -tiny / 4])
    values[1, :2] = torch.tensor([tiny, -tiny / 2])
    values[2, :2] = torch.tensor([LIMIT, -LIMIT / 2])
    reference = encoded_by(backend, values)
    assert reference.absmax.tolist() == [0, tiny, LIMIT]
    # −½ is nearest to −(0.1 + 0.9 · 28.5/64)
    assert reference.codes[:, :3].tolist() == [[0, 0, 0], [128, 220, 0], [128, 220, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_by_hand(backend):
    # A^ref = (−1, −4·(0.1 + 0.9·12.5/64), 4); A = φ·g = (−2, −4, 6)
    reference = Blockwise8.encode(torch.tensor([-1.1, -1.1, 4.0]))
    before = reference.decode()
    gradient, parameter = torch.tensor([-1.0, 4.0, 2.0]), torch.tensor([2.0, -1.0, 3.0])
    versions = [tensor._version for tensor in (reference.codes, reference.absmax)]
    result = penalty_([gradient], [parameter], [reference], weight=0.5, backend=backend)
    assert result.penalty.item() == pytest.approx((-2 - before[0].item()) ** 2 + (-4 - before[1].item()) ** 2)
    assert (result.negative.item(), result.nonfinite.item()) == (2, 0)
    torch.testing.assert_close(gradient, torch.tensor([-(-2 - before[0]), 4 * (-4 - before[1]), 0.0]))
    assert reference.absmax.tolist() == [6.0]
    assert torch.equal(reference.codes, Blockwise8.encode(torch.tensor([-2.0, -4.0, 6.0])).codes)
    assert all(t._version > v for t, v in zip((reference.codes, reference.absmax), versions, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_references_stay_unless_updated(backend):
    reference = Blockwise8.encode(torch.randn(300))
    before, version = copied(reference), reference.codes._version
    penalty_([torch.randn(300)], [torch.randn(300)], [reference], weight=0.5, update_references=False, backend=backend)
    assert torch.equal(reference.codes, before.codes) and torch.equal(reference.absmax, before.absmax)
    assert reference.codes._version == version


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_an_element_left_out_keeps_its_value_in_the_new_scale(backend, bad):
    # 1e38 is finite, but beyond 2^126
    reference = Blockwise8.encode(torch.tensor([-3.0, 2.0]))
    kept = reference.decode()[0]
    gradient, counts = torch.tensor([bad, 8.0]), torch.tensor([-1])
    result = penalty_([gradient], [torch.ones(2)], [reference], weight=1.0, backend=backend, nonfinite_counts=counts)
    assert (result.penalty.item(), result.negative.item(), counts.item()) == (0, 0, 1)
    assert gradient.tolist() == [0, 0]
    assert reference.absmax.item() == 8
    assert torch.equal(reference.codes, Blockwise8.encode(torch.stack([kept, torch.tensor(8.0)])).codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_attribution_beyond_the_limit_hides_in_no_gap(backend):
    reference = Blockwise8.encode(torch.tensor([-LIMIT]))
    # A = −1.5 · 2^126 is beyond it, A − A^ref is not
    result = penalty_([torch.tensor([-1.5 * LIMIT])], [torch.ones(1)], [reference], weight=1.0, backend=backend)
    assert result.nonfinite.item() == 1
    half = torch.tensor([-60_000.0], dtype=torch.float16)
    result = penalty_([torch.tensor([-100_000.0])], [torch.ones(1)], [half], weight=1.0, backend=backend)
    assert result.nonfinite.item() == 1 and half.item() == -60_000


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda r: Blockwise8(r.codes.int(), r.absmax), TypeError, "references[1].codes is torch.int32"),
        (lambda r: Blockwise8(r.codes, r.absmax.double()), TypeError, "references[1].absmax is torch.float64"),
        (lambda r: Blockwise8(r.codes, torch.ones(2)), ValueError, "12 codes on cpu need (1,) there"),
        (lambda r: Blockwise8(r.codes, r.absmax.to("meta")), ValueError, "references[1].absmax is (1,) on meta"),
        (lambda r: Blockwise8(r.codes.view(4, 3).T, r.absmax), ValueError, "references[1].codes of shape (3, 4)"),
        (lambda r: Blockwise8(r.codes.view(4, 3), r.absmax), ValueError, "references[1] is (4, 3)"),
        (lambda r: r.codes, TypeError, "references[1] is torch.uint8"),
    ],
)
def test_bad_references_are_refused_before_anything_is_changed(spoil, error, words):
    gradients, parameters = ([torch.randn(3, 4) for _ in range(2)] for _ in range(2))
    references = [Blockwise8.encode(torch.randn(3, 4)) for _ in range(2)]
    before = [gradient.clone() for gradient in gradients]
    with pytest.raises(error) as caught:
        penalty_(gradients, parameters, [references[0], spoil(references[1])], weight=1.0)
    assert words in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


def test_float64_and_shared_memory_are_refused():
    double = [torch.randn(3, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(TypeError, match=r"references\[0\] is a Blockwise8 beside float64 gradients: pass a float64"):
        penalty_([double[0]], [double[1]], [Blockwise8.encode(double[0])], weight=1.0)
    shared = Blockwise8.encode(torch.randn(3))
    singles = [[torch.randn(3) for _ in range(2)] for _ in range(2)]
    with pytest.raises(ValueError, match="share memory"):
        penalty_(*singles, [shared, Blockwise8(shared.codes.clone(), shared.absmax)], weight=1.0)
    with pytest.raises(ValueError, match="share memory"):
        penalty_(*singles, [shared, Blockwise8(shared.codes, shared.absmax.clone())], weight=1.0)
    # only read, they may be
    penalty_(*singles, [shared, shared], weight=1.0, update_references=False)
