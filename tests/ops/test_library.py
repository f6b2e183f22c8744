"""The operators under torch.library and torch.compile: the same numbers as in eager mode."""

import pytest
import torch
from torch.library import opcheck

from ssiuu_fast.ops import (
    Blockwise8,
    both_weight_gradients,
    neuron_attribution,
    neuron_penalty,
    penalized_weight_gradient,
    penalty_,
    weighted_weight_gradient,
)

OPERATORS = torch.ops.ssiuu_fast
SINGLE = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lists(dtype=torch.float32, count=3, sizes=((3, 5), (7,), (1, 2, 0))):
    """`count` lists of one tensor a size."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(size, generator=generator).to(dtype) for size in sizes] for _ in range(count)]


def neurons(dtype=torch.float32, strided=False):
    """hidden, gradient, reference of a sample, mask."""
    generator = torch.Generator().manual_seed(0)
    if strided:
        hidden, gradient = (t.transpose(0, 1)[..., 1:6] for t in torch.randn(2, 4, 3, 7, generator=generator).to(dtype))
    else:
        hidden, gradient = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
    sums_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    return hidden, gradient, torch.randn(3, 5, generator=generator, dtype=sums_dtype), mask


def copy(tree):
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def assert_equal(one, other):
    """The tensors of two trees, to the last bit."""
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (one, other)), strict=True)
    for a, b in pairs:
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# outs, weight tensor, one_sided, update_references, first
PENALTY = {
    "in place": (False, None, False, True, False),
    "to out, one-sided": (True, torch.tensor(0.3), True, True, False),
    "references stay": (False, None, False, False, False),
    "first": (False, None, False, True, True),
}


@pytest.mark.parametrize("dtype", [*SINGLE, torch.float64])
@pytest.mark.parametrize("options", PENALTY.values(), ids=PENALTY)
def test_penalty_is_a_sound_operator(dtype, options):
    add, weight, *flags = options
    gradients, parameters, references, outs = lists(dtype, 4)
    outs = [outs[0].to(gradients[0].dtype), None, outs[2]] if add else [None] * 3
    parameters[0].requires_grad_()
    arguments = (gradients, parameters, references, outs, 0.5, weight, 2.0, *flags, "auto")
    opcheck(OPERATORS.penalty, arguments)
    results = torch.utils._pytree.tree_leaves(OPERATORS.penalty(*arguments))
    assert not any(tensor.requires_grad for tensor in results)


@pytest.mark.parametrize("dtype", [*SINGLE, torch.float64])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_neuron_operators_are_sound(dtype, masked, strided):
    hidden, gradient, reference, mask = neurons(dtype, strided)
    mask = mask if masked else None
    hidden.requires_grad_()
    opcheck(OPERATORS.neuron_attribution, (hidden, gradient, mask, "auto"))
    assert not OPERATORS.neuron_attribution(hidden, gradient, mask, "auto")[0].requires_grad
    weight = torch.tensor(0.3) if strided else None
    for given, per_sample, one_sided in (
        (reference, True, masked),
        (reference[0], False, strided),
        (None, masked, True),
    ):
        arguments = (hidden, gradient, given, mask, 0.5, weight, per_sample, one_sided, "auto")
        opcheck(OPERATORS.neuron_penalty, arguments)
        assert not any(tensor.requires_grad for tensor in OPERATORS.neuron_penalty(*arguments))


@pytest.mark.parametrize("dtype", [*SINGLE, torch.float64])
def test_weight_gradients_are_sound_operators(dtype):
    hidden, gradient, _, _ = neurons(dtype, strided=True)
    weights = torch.randn(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    input = hidden[..., :3].requires_grad_()
    opcheck(OPERATORS.weighted_weight_gradient, (gradient, input, weights, "auto"))
    assert not OPERATORS.weighted_weight_gradient(gradient, input, weights, "auto").requires_grad
    opcheck(OPERATORS.both_weight_gradients, (gradient, input, weights, "auto"))
    assert not OPERATORS.both_weight_gradients(gradient, input, weights, "auto")[0].requires_grad


def test_both_weight_gradients_in_a_graph():
    gradient, input, weights = torch.randn(5, 3, 4), torch.randn(5, 3, 6), torch.randn(5)
    compiled = torch.compile(both_weight_gradients, fullgraph=True, backend="aot_eager")
    for out in (None, (torch.randn(4, 6), None)):
        given = [copy(out) for _ in range(2)]
        eager = both_weight_gradients(gradient, input, weights, out=given[0])
        traced = compiled(gradient, input, weights, out=given[1])
        for one, other in zip((*eager, *(given[0] or ())), (*traced, *(given[1] or ())), strict=True):
            torch.testing.assert_close(one, other)


def test_penalized_weight_gradient_is_not_traced():
    lists = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.ones(2), torch.randn(4, 5), torch.randn(4, 5)
    compiled = torch.compile(penalized_weight_gradient, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="can't be traced"):
        compiled(*lists, weight=1.0)


def test_weighted_weight_gradient_in_a_graph():
    gradient, input, weights = torch.randn(5, 3, 4), torch.randn(5, 3, 6), torch.randn(5)
    for rows in (None, slice(1, 4), torch.tensor([3, 0])):
        for out in (None, torch.randn(4, 6)):
            compiled = torch.compile(weighted_weight_gradient, fullgraph=True, backend="aot_eager")
            given = [None if out is None else out.clone() for _ in range(2)]
            eager = weighted_weight_gradient(gradient, input, weights, rows=rows, out=given[0])
            traced = compiled(gradient, input, weights, rows=rows, out=given[1])
            torch.testing.assert_close(traced, eager)
            assert out is None or torch.equal(given[1], traced)


@pytest.mark.parametrize("name", ["neuron_attribution", "neuron_penalty", "penalty"])
def test_nothing_given_to_the_functional_forms_changes(name):
    hidden, gradient, reference, mask = neurons()
    arguments = {
        "neuron_attribution": (hidden, gradient, mask, "auto"),
        "neuron_penalty": (hidden, gradient, reference, mask, 0.5, None, True, False, "auto"),
        "penalty": (*lists(), [None] * 3, 0.5, None, False, True, False, 1.0, "auto"),
    }[name]
    before = copy(arguments)
    getattr(OPERATORS, name)(*arguments)
    assert_equal(arguments, before)


def step(gradients, parameters, references, out=None, weight=0.5, **options):
    """A piece of a user's step, with work of its own around the call."""
    gradients = [gradient * 2 for gradient in gradients] if out is not None else gradients
    result = penalty_(gradients, parameters, references, weight=weight, out=out, **options)
    return result.penalty * 2, result.negative, result.gradient_square, result.nonfinite, gradients[0] + 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [{}, {"one_sided": True}, {"first": True}, {"update_references": False}, {"weight": torch.tensor(0.3)}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("add", [False, True])
def test_compiled_penalty(backend, options, add):
    given = lists(torch.bfloat16)
    given[0][1][3] = torch.nan
    given[1][0].requires_grad_()
    out = [torch.ones(3, 5), None, None] if add else None
    expected_state, state = copy((given, out)), copy((given, out))
    for tensors in (expected_state, state):
        tensors[0][1][0] = tensors[0][1][0].detach().requires_grad_()
    expected = step(*expected_state[0], out=expected_state[1], **options)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    result = compiled(*state[0], out=state[1], **options)
    assert_equal(result, expected)
    assert_equal(state, expected_state)
    assert not any(tensor.requires_grad for tensor in result)


def test_compiled_penalty_fills_the_counts():
    given, counts = lists(), torch.full((3,), -1)
    given[0][1][3] = torch.nan

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors):
        return penalty_(*tensors, weight=1.0, nonfinite_counts=counts).nonfinite

    assert compiled(*given) == 1 and counts.tolist() == [0, 1, 0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strided", [True, False])
def test_compiled_neuron_operators(backend, strided):
    def work(hidden, gradient, reference, mask, weight):
        attribution = neuron_attribution(hidden, gradient, mask)
        result = neuron_penalty(hidden, gradient, reference, mask, weight=weight, per_sample=True)
        return attribution.max - attribution.min, attribution.sum, *result, gradient.float().abs().sum()

    compiled = torch.compile(work, fullgraph=True, backend=backend)
    for dtype, weight in ((torch.bfloat16, 0.5), (torch.float32, 0.25), (torch.float32, torch.tensor(0.3))):
        expected_state, state = neurons(dtype, strided), neurons(dtype, strided)
        expected_state[0].requires_grad_()
        state[0].requires_grad_()
        expected, result = work(*expected_state, weight), compiled(*state, weight)
        assert_equal(result, expected)
        assert_equal(state[1], expected_state[1])
        assert not any(tensor.requires_grad for tensor in result)


def test_any_number_of_tokens_in_one_graph():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(neuron_attribution, fullgraph=True, dynamic=True, backend=counting)
    for tokens in (3, 5, 8):
        hidden, gradient = torch.randn(2, 2, tokens, 6)
        assert_equal(compiled(hidden, gradient), neuron_attribution(hidden, gradient))
    assert len(graphs) == 1


def test_refusals_in_a_graph():
    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    gradients, parameters, references = lists()
    with pytest.raises(Exception, match=r"gradients\[0\] requires grad"):
        compiled(step)([gradients[0].requires_grad_(), *gradients[1:]], parameters, references)

    coded = [references[0], Blockwise8.encode(references[1]), references[2]]
    with pytest.raises(Exception, match=r"references\[1\] is a Blockwise8"):
        compiled(step)(lists()[0], lists()[1], coded)
    hidden, gradient, reference, mask = neurons()
    with pytest.raises(ValueError, match="weight must be finite"):
        compiled(neuron_penalty)(hidden, gradient, reference, weight=float("inf"), per_sample=True)
    with pytest.raises(RuntimeError, match="works on CPU tensors|can't run"):
        compiled(neuron_attribution)(hidden, gradient, backend="cuda")
