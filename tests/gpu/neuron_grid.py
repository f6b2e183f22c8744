"""neuron_attribution and neuron_penalty on a device against fp64 and the reference backend; runs on the CPU too."""

import torch
from penalty_grid import assert_equal
from three_way import assert_three_way

from ssiuu_fast.ops import neuron_attribution, neuron_penalty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "token-major", "every second token")
NAMES = ("max", "min", "sum")


def embedded(values, layout):
    """A memory of NaN, and in it a view of [batch, tokens, neurons] that holds the values."""
    batch, tokens, neurons = values.shape
    if layout == "contiguous":
        memory = torch.full_like(values, torch.nan)
        view = memory
    elif layout == "token-major":
        # one element into rows of an odd length
        memory = values.new_full((tokens, batch, neurons + 3), torch.nan)
        view = memory.transpose(0, 1)[..., 1 : neurons + 1]
    else:
        memory = values.new_full((batch, 2 * tokens, neurons), torch.nan)
        view = memory[:, ::2]
    view.copy_(values)
    return memory, view


def whole_numbers(shape, dtype, device, generator):
    """Products and their sums over 100,000 tokens are exact in fp32, in any order."""
    return torch.empty(shape, dtype=dtype, device=generator.device).random_(-5, 6, generator=generator).to(device)


def normal(shape, dtype, device, generator):
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def mask_of(shape, device, generator, dtype):
    return (torch.rand(shape[:2], generator=generator) < 0.7).to(device=device, dtype=dtype)


def poison(tensor, generator):
    """NaN and infinities at a few places."""
    if tensor.numel():
        for value in (torch.nan, torch.inf, -torch.inf):
            place = torch.randint(tensor.numel(), (), generator=generator).item()
            tensor.view(-1)[place] = value


def check_attribution(shape, dtype, layout, masked, device, backend):
    what = f"{shape} {dtype} {layout}, masked {masked}"
    generator = torch.Generator().manual_seed(sum(shape))
    _, hidden = embedded(normal(shape, dtype, device, generator), layout)
    _, gradient = embedded(normal(shape, dtype, device, generator), layout)
    mask = mask_of(shape, device, generator, torch.bool) if masked else None
    truth = neuron_attribution(hidden.double(), gradient.double(), mask, backend="reference")
    plain = neuron_attribution(hidden, gradient, mask, backend="reference")
    mine = neuron_attribution(hidden, gradient, mask, backend=backend)
    for name in NAMES:
        assert getattr(mine, name).dtype == torch.float32 and getattr(mine, name).shape == (shape[0], shape[2]), what
    assert_equal(mine.max, plain.max, f"max of {what}")
    assert_equal(mine.min, plain.min, f"min of {what}")
    assert_three_way(mine.sum, plain.sum, truth.sum, f"sum of {what}")


def check_poisoned_attribution(shape, dtype, layout, device, backend):
    """Non-finite values at counted and at masked tokens: as the reference has it, sums too, being exact."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = [whole_numbers(shape, dtype, device, generator) for _ in range(2)]
    for tensor in values:
        poison(tensor, generator)
    (_, hidden), (_, gradient) = (embedded(tensor, layout) for tensor in values)
    for kind in (None, torch.bool, torch.int64, torch.uint8):
        mask = None if kind is None else mask_of(shape, device, generator, kind)
        plain = neuron_attribution(hidden, gradient, mask, backend="reference")
        mine = neuron_attribution(hidden, gradient, mask, backend=backend)
        for name in NAMES:
            what = f"{name} of {shape} {dtype} {layout}, mask {kind}"
            assert_equal(getattr(mine, name), getattr(plain, name), what)


def check_exact_penalty(shape, dtype, layout, device, backend, *, per_sample, one_sided, poisoned=False):
    """Whole numbers, so that the reference's bits are expected of everything, signs of A and memory around included."""
    batch, _, neurons = shape
    generator = torch.Generator().manual_seed(sum(shape))
    values = [whole_numbers(shape, dtype, device, generator) for _ in range(2)]
    if poisoned:
        for tensor in values:
            poison(tensor, generator)
    stored = torch.randint(-40, 40, (batch, neurons) if per_sample else (neurons,), generator=generator).float()
    stored = stored.to(device)
    masks = [None, *(mask_of(shape, device, generator, kind) for kind in (torch.bool, torch.int32))]
    for reference in (None, stored):
        for mask in masks:
            outcomes = []
            for name in ("reference", backend):
                _, hidden = embedded(values[0], layout)
                memory, gradient = embedded(values[1], layout)
                before = None if reference is None else reference.clone()
                result = neuron_penalty(
                    hidden,
                    gradient,
                    before,
                    mask,
                    weight=0.5,
                    per_sample=per_sample,
                    one_sided=one_sided,
                    backend=name,
                )
                assert result.injection.data_ptr() == gradient.data_ptr()
                assert reference is None or torch.equal(before, reference), "the reference was written"
                outcomes.append((memory, *result))
            what = f"{shape} {dtype} {layout}, per_sample {per_sample}, one_sided {one_sided}, poisoned {poisoned}"
            names = ("memory", "injection", "attribution", "penalty", "negative")
            for plain, mine, name in zip(*outcomes, names, strict=True):
                assert plain.dtype == mine.dtype and plain.shape == mine.shape and plain.device == mine.device, what
                assert_equal(mine, plain, f"{name} of {what}")


def check_penalty(shape, dtype, layout, masked, device, backend, *, per_sample):
    """Random numbers: attribution and injection by the three-way bound, where the sign of A is beyond doubt."""
    what = f"{shape} {dtype} {layout}, masked {masked}, per_sample {per_sample}"
    batch, _, neurons = shape
    generator = torch.Generator().manual_seed(sum(shape))
    values = [normal(shape, dtype, device, generator) for _ in range(2)]
    reference = torch.randn((batch, neurons) if per_sample else (neurons,), generator=generator).to(device)
    mask = mask_of(shape, device, generator, torch.bool) if masked else None

    def outcome(name, kind):
        _, hidden = embedded(values[0].to(kind), layout)
        _, gradient = embedded(values[1].to(kind), layout)
        stored = reference.double() if kind == torch.float64 else reference
        return neuron_penalty(hidden, gradient, stored, mask, weight=0.37, per_sample=per_sample, backend=name)

    truth, plain, mine = outcome("reference", torch.float64), outcome("reference", dtype), outcome(backend, dtype)
    # blocks of the sum may be added in fp32: one rounding of all that was added
    magnitude = (values[0].double() * values[1].double()).abs()
    if masked:
        magnitude = magnitude * mask.unsqueeze(-1)
    magnitude = magnitude.sum(1) if per_sample else magnitude.sum((0, 1))
    rounding = torch.finfo(torch.float32).eps * magnitude
    error = (mine.attribution.double() - truth.attribution).abs()
    bound = (plain.attribution.double() - truth.attribution).abs() + rounding
    excess = (error - bound).flatten()
    if excess.numel():
        assert excess.max() <= 0, f"attribution of {what}, worst at {excess.argmax().item()}: {error.max().item():.3e}"
    undecided = (truth.attribution.abs() <= bound) & (truth.attribution != 0)
    assert undecided.double().sum() <= 1e-2 * undecided.numel(), what
    decided = ~(undecided.unsqueeze(1) if per_sample else undecided)
    injections = [torch.where(decided, result.injection.double(), 0) for result in (mine, plain, truth)]
    if not injections[0].numel():
        return
    mine_error, plain_error = ((t - injections[2]).abs().max() for t in injections[:2])
    steepest = values[1].double().abs().max()
    allowed = plain_error + torch.finfo(dtype).eps * injections[2].abs().max() + 2 * 0.37 * rounding.max() * steepest
    assert mine_error <= allowed, f"injection of {what}: error {mine_error.item():.3e} > {allowed.item():.3e}"
    assert (mine.negative - truth.negative).abs() <= undecided.sum(), what
    torch.testing.assert_close(mine.penalty, truth.penalty, rtol=1e-4, atol=1e-6)
