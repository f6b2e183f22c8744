"""Cases of the operators on weight gradients, what they should give, and checks of it for any backend and device."""

from typing import NamedTuple

import torch
from three_way import assert_three_way

from ssiuu_fast.ops import both_weight_gradients, penalized_weight_gradient, weighted_weight_gradient

SINGLE = (torch.float32, torch.bfloat16, torch.float16)
# leading dimensions, N, K: no sample, no token, single elements, primes, no feature, several token dimensions or none
SHAPES = (
    ((1, 1), 1, 1),
    ((3, 17), 5, 13),
    ((0, 3), 4, 7),
    ((3, 0), 4, 7),
    ((2, 5), 0, 3),
    ((2, 5), 3, 0),
    ((7,), 11, 2),
    ((5, 2, 3), 31, 37),
    ((2, 3, 1, 5), 2, 67),
    ((4, 33), 67, 41),
)
ROWS = ("all", "slice", "stepping slice", "indices", "none")
LAYOUTS = ("contiguous", "features first", "in a row with others", "expanded over samples")
GUARD = 3.0
SINGLE_EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """Arguments of a call, and the weights whose samples outside of `rows` are 0."""

    gradient: torch.Tensor
    input: torch.Tensor
    weights: torch.Tensor
    rows: slice | torch.Tensor | None

    @property
    def shape(self):
        return self.gradient.shape[-1], self.input.shape[-1]

    def double(self):
        return self._replace(
            gradient=self.gradient.double(), input=self.input.double(), weights=self.weights.double(), rows=None
        )

    def absolute(self):
        return self._replace(gradient=self.gradient.abs(), input=self.input.abs(), weights=self.weights.abs())

    def to(self, device):
        """On a device, with the same strides; indices of samples stay where they are."""

        def place(tensor):
            if tensor.device == device:
                return tensor
            memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        return Case(*map(place, self[:3]), self.rows)


def rows_of(kind, batch):
    return {
        "all": None,
        "slice": slice(batch // 3, batch - batch // 4),
        "stepping slice": slice(1, None, 2),
        "indices": torch.arange(batch - 1, -1, -2),
        "none": slice(0, 0),
    }[kind]


def laid_out(tensor, layout):
    """The same numbers, but for the expanded one, in another layout and a memory of NaN."""
    if layout == "features first":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "in a row with others":
        memory = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        return memory[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)
    if layout == "expanded over samples":
        return tensor[:1].expand(tensor.shape)
    return tensor


def make_case(shape, dtype, number, generator, *, whole=False):
    """Whole numbers have sums that are exact in float32 in any order."""
    leading, outputs, inputs = shape

    def values(*size):
        if whole:
            return torch.randint(-2, 3, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    gradient = laid_out(values(*leading, outputs), LAYOUTS[number % 4])
    input = laid_out(values(*leading, inputs), LAYOUTS[number // 4 % 4])
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(leading[0], generator=generator, dtype=torch.float64)
    # r_s = P_s / w_s spans decades
    weights = weights.mul(2).round() if whole else weights * 10 ** torch.randn(leading[0], generator=generator)
    rows = rows_of(ROWS[number % 5], leading[0])
    if rows is not None:
        kept = torch.zeros_like(weights)
        kept[rows] = 1
        weights = weights * kept
    return Case(gradient, input, weights.to(weight_dtype), rows)


def cases(dtype, shapes=SHAPES, seeds=3, **options):
    """Each shape with each seed, layouts and rows in turn."""
    for seed in range(seeds):
        for place, shape in enumerate(shapes):
            number = 7 * seed + place
            generator = torch.Generator().manual_seed(number)
            yield f"{shape} {dtype}, case {number}", make_case(shape, dtype, number, generator, **options)


def truth_of(case, weights=None):
    """The sum over everything at once, in float64."""
    double = case.double()
    gradient, input = (t.reshape(t.shape[0], t.shape[1:-1].numel(), t.shape[-1]) for t in double[:2])
    return torch.einsum("b,btn,btk->nk", double.weights if weights is None else weights.double(), gradient, input)


def rounding_of(case, scaled_operand=False, out=None):
    """By how much a sum in float32 with `out`, in an order of its own, may be off.

    scaled_operand: the products are of operands of which one was rounded, and are rounded before they are added to out.
    """
    if not all(case.shape):
        return 0.0
    roundings = 4 * SINGLE_EPS
    if scaled_operand:
        roundings += torch.finfo(case.gradient.dtype).eps
    largest = truth_of(case.absolute()).max()
    return roundings * (largest if out is None else largest + out.abs().max())


def transcribed(case):
    """As a user's own few lines of torch would: every step in the dtype of storage."""
    total = case.gradient.new_zeros(case.shape)
    for gradient, input, weight in zip(*case[:3], strict=True):
        gradient, input = (tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]) for tensor in (gradient, input))
        total += weight.to(total.dtype) * (gradient.T @ input)
    return total


def guarded(values, row=0):
    """A memory of threes, and in it a view that holds the values; row: elements between its rows."""
    rows, columns = values.shape
    memory = values.new_full((rows * (columns + row) + 8,), GUARD)
    return memory, memory[5 : 5 + rows * (columns + row)].view(rows, columns + row)[:, :columns].copy_(values)


def check_guards(memory, view, what):
    outside = memory.clone()
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(GUARD)
    assert (outside == GUARD).all(), f"{what}: memory outside of it was written"


def random_out(case, number, dtype):
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(case.shape, generator=generator).to(device=case.gradient.device, dtype=dtype)
    return guarded(values, row=number % 2)


def outs_of(case, number):
    """None, the dtype of gradient, float32: (memory, view) or None, for two results."""
    kinds = (None, case.gradient.dtype, torch.float32)
    chosen = kinds[number % 3], kinds[number // 3 % 3]
    return [None if dtype is None else random_out(case, number + i, dtype) for i, dtype in enumerate(chosen)]


def _check_sum(result, case, before, name, backend):
    """One result against the float64 sum, on top of what was there."""
    bounded = {"scaled_operand": backend in ("library", "auto"), "out": before}
    truth, plain = truth_of(case), transcribed(case)
    assert result.shape == case.shape and not result.requires_grad, name
    if before is not None:
        truth, plain = before.double() + truth, before + plain
    else:
        assert result.dtype == case.gradient.dtype, name
    assert_three_way(result, plain, truth, name, rounding_of(case, **bounded))


def _added_to(call, outs, name):
    """(result, what was there) of each of a call's results; what is around them must stay."""
    before = [None if out is None else out[1].clone() for out in outs]
    results = call(*(None if out is None else out[1] for out in outs))
    for out, result in zip(outs, results, strict=True):
        if out is not None:
            assert result is out[1], name
            check_guards(*out, name)
    return list(zip(results, before, strict=True))


def check_weighted(name, case, number, backend):
    def call(out):
        return [
            weighted_weight_gradient(case.gradient, case.input, case.weights, rows=case.rows, out=out, backend=backend)
        ]

    ((result, before),) = _added_to(call, outs_of(case, number)[:1], name)
    _check_sum(result, case, before, name, backend)


def check_both(name, case, number, backend):
    def call(*out):
        return both_weight_gradients(case.gradient, case.input, case.weights, rows=case.rows, out=out, backend=backend)

    (plain, plain_before), (weighted, weighted_before) = _added_to(call, outs_of(case, number), name)
    _check_sum(weighted, case, weighted_before, f"weighted of {name}", backend)
    unweighted = case._replace(weights=torch.ones_like(case.weights))
    _check_sum(plain, unweighted, plain_before, f"plain of {name}", "plain")


OPTIONS = [
    {"first": first, "update_reference": update, "one_sided": one_sided, "weight": 0.5, "gradient_scale": 2.0}
    for first, update in ((False, True), (True, True), (False, False))
    for one_sided in (False, True)
]


class State(NamedTuple):
    """parameter, and (memory, view) of reference and, if there is one, out."""

    parameter: torch.Tensor
    reference: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor] | None

    def copy(self):
        """With memory of its own where a call writes."""
        return self._replace(
            reference=guarded(self.reference[1]), out=None if self.out is None else guarded(self.out[1])
        )

    def run(self, case, options, backend):
        """Everything that a call writes and returns: gradient, reference, four sums."""
        out = None if self.out is None else self.out[1]
        result = penalized_weight_gradient(
            *case[:3], self.parameter, self.reference[1], rows=case.rows, out=out, backend=backend, **options
        )
        assert out is None or result.gradient is out
        return [result.gradient, self.reference[1], *result[1:]]


def make_state(case, number, *, whole=False):
    """Dtypes of parameter, reference and out in turn."""
    generator = torch.Generator().manual_seed(number)
    device = case.gradient.device

    def values(dtype, scale=1.0):
        if case.gradient.dtype == torch.float64:
            dtype = torch.float64
        if whole:
            return torch.randint(-3, 4, case.shape, generator=generator).to(device=device, dtype=dtype) * int(scale)
        return (torch.randn(case.shape, generator=generator) * scale).to(device=device, dtype=dtype)

    parameter = values(SINGLE[number % 3])
    reference = guarded(values((torch.float32, torch.bfloat16)[number // 3 % 2], 4.0))
    outs = (None, case.gradient.dtype, torch.float32)
    out = outs[number // 2 % 3]
    return State(parameter, reference, None if out is None else guarded(values(out)))


def poison(state, case, number):
    """No number in a few elements of parameter and reference, and in a sample that counts."""
    for i, tensor in enumerate((state.parameter, state.reference[1])):
        if tensor.numel():
            tensor.view(-1)[(7 * number + i) % tensor.numel()] = (torch.nan, torch.inf, -torch.inf)[(number + i) % 3]
    gradient = case.gradient.contiguous().clone()
    if gradient.numel():
        gradient.view(-1)[number % gradient.numel()] = torch.nan if number % 2 else torch.inf
    return case._replace(gradient=gradient)


def check_penalized_exact(name, case, number, backend, *, poisoned=False, ulps=0, sums=0, options=OPTIONS):
    """Whole numbers: the reference backend's bits are expected of everything.

    ulps: by how much bfloat16 may be off; sums: by what share of them the sums in float64 may.
    """
    state = make_state(case, number, whole=True)
    if poisoned:
        case = poison(state, case, number)
    for chosen in options:
        outcomes = []
        for which in ("reference", backend):
            mine = state.copy()
            if chosen["first"]:
                mine.reference[1].fill_(torch.nan)
            outcomes.append(mine.run(case, chosen, which))
            for memory in (mine.reference, mine.out):
                if memory is not None:
                    check_guards(*memory, name)
        fields = ("gradient", "reference", "penalty", "negative", "gradient_square", "nonfinite")
        for plain, kernel, field in zip(*outcomes, fields, strict=True):
            what = f"{field} of {name}, options {chosen}"
            assert plain.dtype == kernel.dtype and plain.shape == kernel.shape and plain.device == kernel.device, what
            rtol = {torch.bfloat16: ulps * torch.finfo(torch.bfloat16).eps, torch.float64: sums}.get(plain.dtype, 0)
            torch.testing.assert_close(kernel, plain, rtol=rtol, atol=0, equal_nan=True, msg=what)


def check_penalized(name, case, number, backend):
    """Random numbers, against the formula in float64, where the signs of A and d are beyond doubt."""
    state = make_state(case, number)
    options = OPTIONS[number % 6] | {"weight": 0.37, "gradient_scale": 0.73}
    phi, previous = state.parameter.double(), state.reference[1].double()
    library = backend in ("library", "auto")
    storage = torch.finfo(case.gradient.dtype).eps
    roundings = 4 * SINGLE_EPS + (2 * storage if library else 0)
    unweighted = case._replace(weights=torch.ones_like(case.weights))
    plain = truth_of(unweighted)
    # the library rounds its product before it adds it to out
    plain_error = (4 * SINGLE_EPS + storage * library) * truth_of(unweighted.absolute())
    if state.out is not None:
        plain, plain_error = plain + state.out[1].double(), plain_error + SINGLE_EPS * state.out[1].double().abs()
    g = 0.73 * truth_of(case)
    g_error = 0.73 * roundings * truth_of(case.absolute())
    if library:
        # the smallest step of float16, where a scaled operand and g are near 0
        step = storage * torch.finfo(case.gradient.dtype).tiny
        g_error += 0.73 * step * (1 + case.gradient.double().abs().sum() + case.input.double().abs().sum())
    attribution, gap = phi * g, phi * g - previous
    attribution_error = phi.abs() * g_error + SINGLE_EPS * attribution.abs()
    gap_error = attribution_error + SINGLE_EPS * (attribution.abs() + previous.abs())
    punished = (attribution < 0) & (gap < 0) if options["one_sided"] else attribution < 0
    d = torch.where(punished, gap, 0)
    if options["first"]:
        d = torch.zeros_like(gap)
    undecided = (attribution.abs() <= attribution_error) & (attribution_error > 0)
    if options["one_sided"]:
        undecided |= (attribution < 0) & (gap.abs() <= gap_error)
    expected = plain + 2 * 0.37 * d * g
    value_error = 2 * 0.37 * (gap_error * g.abs() + gap_error * g_error + d.abs() * g_error)
    written = state.out[1].dtype if state.out is not None else case.gradient.dtype
    error = plain_error + value_error + 4 * SINGLE_EPS * (plain.abs() + expected.abs())
    error += torch.finfo(written).eps * expected.abs() + library * storage * (plain.abs() + expected.abs())

    gradient, reference, penalty, negative, square, nonfinite = state.run(case, options, backend)
    assert nonfinite == 0, name
    wrong = ((gradient.double() - expected).abs() > error + torch.finfo(written).tiny) & ~undecided
    wrong &= expected.abs() + error < torch.finfo(written).max
    assert not wrong.any(), f"gradient of {name}, {wrong.sum()} wrong, first at {wrong.nonzero()[0].tolist()}"
    stored = attribution if options["update_reference"] else previous
    allowed = attribution_error + torch.finfo(reference.dtype).eps * attribution.abs()
    assert ((reference.double() - stored).abs() <= allowed).all(), f"reference of {name}"
    assert (negative - (attribution < 0).sum()).abs() <= undecided.sum(), f"negative of {name}"
    undecided_gap = torch.where(undecided, gap.abs() + gap_error, 0)
    d_error = torch.where(punished, gap_error, 0) * (not options["first"])
    off = (2 * d.abs() * d_error + d_error.square() + undecided_gap.square()).sum()
    assert (penalty - d.square().sum()).abs() <= off + 1e-12, f"penalty of {name}"
    slope = 2 * d * g
    slope_error = 2 * (d_error * (g.abs() + g_error) + d.abs() * g_error + undecided_gap * (g.abs() + g_error))
    off = (2 * slope.abs() * slope_error + slope_error.square()).sum()
    assert (square - slope.square().sum()).abs() <= off + 1e-12, f"gradient_square of {name}"
