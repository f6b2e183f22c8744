"""penalty_ on a device, call by call against fp64 and the reference backend; runs on the CPU too."""

import itertools

import torch
from penalty_cases import SINGLE, SIZES, Case, expected, random_case
from three_way import assert_three_way, check_sums

from ssiuu_fast import ops
from ssiuu_fast.ops import penalty_

OPTIONS = [
    {"first": first, "update_references": update, "one_sided": one_sided, "weight": 0.37, "gradient_scale": 0.73}
    for first, update in ((True, True), (False, True), (False, False))
    for one_sided in (False, True)
]
REFERENCES = (*SINGLE, "8bit")
OUTS = (None, "same", torch.float32)
# gradient, parameter, reference, out; "same" is the gradient's
COMBINATIONS = list(itertools.product(SINGLE, SINGLE, REFERENCES, OUTS))


def covering(number):
    """Six of COMBINATIONS for OPTIONS[number], what Triton has to compile kept small.

    Each has every dtype of every role; those of two numbers that follow each other have every pair of dtypes together.
    """
    places = [(i, j) for i in range(3) for j in range(4) if (i + j + number) % 2 == 0]
    return [(SINGLE[i], SINGLE[(i + j) % 3], REFERENCES[j], OUTS[(i + 2 * j) % 3]) for i, j in places]


# where each tensor starts in its memory, in elements: all aligned, all one off, each its own
ALIGNED, ODD, MIXED = range(3)
GUARD = 3


def guarded(tensor, device, start):
    """A copy on the device that starts at element `start` of a memory of threes, and ends 8 before its end."""
    size = tensor.numel()
    memory = torch.full((start + size + 8,), GUARD, dtype=tensor.dtype, device=device)
    return memory[start : start + size].view(tensor.shape).copy_(tensor)


def check_guards(tensor, what):
    memory, start = tensor._base, tensor.storage_offset()
    outside = torch.cat([memory[:start], memory[start + tensor.numel() :]])
    assert (outside == GUARD).all(), f"{what}: memory outside the tensor was written"


def eight_bit(reference):
    return not isinstance(reference, torch.Tensor)


def placed(case, device, layout):
    """A copy of a case on a device."""

    def place(tensor, role, index):
        start = (0, 1, (role + index) % 9)[layout]
        if tensor is None:
            return None
        if eight_bit(tensor):
            return ops.Blockwise8(guarded(tensor.codes, device, start), guarded(tensor.absmax, device, start % 2))
        return guarded(tensor, device, start)

    lists = (case.gradients, case.parameters, case.references, case.outs)
    copies = ([place(t, role, i) for i, t in enumerate(tensors)] for role, tensors in enumerate(lists))
    return Case(*copies, dict(case.options))


def encoded(reference, generator):
    """The reference in 8 bits; what isn't finite stands for memory that nobody has written."""
    if reference.isfinite().all():
        return ops.Blockwise8.encode(reference)
    result = ops.Blockwise8.empty_like(reference)
    result.codes.copy_(torch.randint(256, reference.shape, generator=generator))
    result.absmax.fill_(torch.nan)
    return result


def case_of(combinations, options, seed, sizes=SIZES):
    """One call on a tensor for each combination of dtypes, sizes in turn."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size, dtype, scale):
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    case = Case([], [], [], [], dict(options))
    for i, (gradient, parameter, reference, out) in enumerate(combinations):
        size = sizes[(seed + i) % len(sizes)]
        case.gradients.append(normal(size, gradient, 0.5))
        case.parameters.append(normal(size, parameter, 2))
        stored = normal(size, torch.float32 if reference == "8bit" else reference, 1)
        if options["first"]:
            stored.fill_(torch.nan)
        case.references.append(encoded(stored, generator) if reference == "8bit" else stored)
        case.outs.append(None if out is None else normal(size, gradient if out == "same" else out, 1))
    return case


def random_call(seed, *, poison=False):
    return random_case(torch.Generator().manual_seed(seed), poison=poison)


def covered_call(seed, *, poison=False):
    """A random call on one to four tensors of what `covering` has, so that Triton compiles nothing new for it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    number = draw(range(len(OPTIONS)))
    # sizes that are multiples of 16 allow other kernels than the rest
    sizes = [draw(SIZES) if draw((True, False)) else 16 * draw(range(300)) for _ in range(4)]
    options = OPTIONS[number] | {"weight": draw((1.0, 0.37, 1e-3)), "gradient_scale": draw((1.0, 0.73, 2.0))}
    combinations = [draw(covering(number)) for _ in range(draw(range(1, 5)))]
    # sizes are taken from the first on
    case = case_of(combinations, options, len(sizes) * seed, sizes=sizes)
    for gradient in case.gradients if poison else []:
        if gradient.numel():
            gradient[draw(range(gradient.numel()))] = draw((torch.inf, -torch.inf, torch.nan))
    return case


def in_float(case):
    """The case with references of 8 bits decoded."""
    references = [r.decode() if eight_bit(r) else r for r in case.references]
    return Case(case.gradients, case.parameters, references, case.outs, case.options)


def written(case):
    return [gradient if out is None else out for gradient, out in zip(case.gradients, case.outs, strict=True)]


def parts(reference):
    return (reference.codes, reference.absmax) if eight_bit(reference) else (reference,)


def assert_equal(mine, theirs, what):
    """The same numbers; the sign of a zero and the bits of a NaN may differ."""
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_same_outcome(mine, theirs, what):
    """Values and references of two runs of one case agree bit for bit."""
    for i in range(len(mine.gradients)):
        kinds = f"{what}, index {i} ({', '.join(str(t.dtype) for t in (mine.gradients[i], mine.parameters[i]))})"
        assert_equal(written(mine)[i], written(theirs)[i], f"value of {kinds}")
        for one, other in zip(parts(mine.references[i]), parts(theirs.references[i]), strict=True):
            assert_equal(one, other, f"reference of {kinds}")


def assert_untouched(case, original, what):
    """Nothing was written outside the tensors that are, nor into what is only read."""
    for i in range(len(case.gradients)):
        read = [(case.parameters[i], original.parameters[i])]
        if case.outs[i] is not None:
            read.append((case.gradients[i], original.gradients[i]))
        for tensor, before in read:
            assert torch.equal(tensor, before), f"{what}: something that is only read was written at index {i}"
        for tensor in (case.gradients[i], *parts(case.references[i]), written(case)[i]):
            check_guards(tensor, f"{what}, index {i}")


def run(case, backend, what, **more):
    """Result and counts of a call on `case`, whose counts must add up to the total."""
    device = case.gradients[0].device
    counts = torch.full((len(case.gradients),), -1, device=device)
    result = case.run(penalty_, backend, nonfinite_counts=counts, **more)
    assert all(x.shape == () and x.device == device for x in result), what
    assert counts.min() >= 0 and counts.sum() == result.nonfinite, f"nonfinite_counts of {what}: {counts.tolist()}"
    return result, counts


def check(case, device, backend, layout, what):
    """One finite call: the three-way bound, the reference backend's bits, the sums, and nothing else written."""
    original = placed(case, device, ALIGNED)
    truths = list(expected(in_float(original), torch.float64))
    transcriptions = list(expected(in_float(original)))
    mine, theirs = placed(case, device, layout), placed(case, device, ALIGNED)
    result, _ = run(mine, backend, what)
    run(theirs, "reference", what)
    for i, (truth, transcription) in enumerate(zip(truths, transcriptions, strict=True)):
        assert_three_way(written(mine)[i], transcription.value, truth.value, f"value[{i}] of {what}")
        reference = mine.references[i]
        if not eight_bit(reference):
            assert_three_way(reference, transcription.reference, truth.reference, f"reference[{i}] of {what}")
    assert_same_outcome(mine, theirs, what)
    assert_untouched(mine, original, what)
    check_sums(result, truths, what)


def check_poisoned(case, device, backend, layout, what):
    """A call with non-finite elements: everything as the reference backend has it."""
    original = placed(case, device, ALIGNED)
    mine, theirs = placed(case, device, layout), placed(case, device, ALIGNED)
    (result, counts), (plain, plain_counts) = run(mine, backend, what), run(theirs, "reference", what)
    assert_same_outcome(mine, theirs, what)
    assert torch.equal(counts, plain_counts), f"nonfinite_counts of {what}"
    assert_same_sums(result, plain, what)
    for i in range(len(mine.gradients)):
        for tensor in (mine.gradients[i], *parts(mine.references[i]), written(mine)[i]):
            check_guards(tensor, f"{what}, index {i}")
        assert_equal(mine.parameters[i], original.parameters[i], what)


def assert_same_sums(mine, theirs, what):
    for name in ("negative", "nonfinite"):
        assert getattr(mine, name) == getattr(theirs, name), f"{name} of {what}"
    for name in ("penalty", "gradient_square"):
        one, other = getattr(mine, name), getattr(theirs, name)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, msg=lambda text, n=name: f"{n} of {what}: {text}")
