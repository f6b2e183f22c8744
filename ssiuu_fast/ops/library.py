"""The operators as torch.library knows them, so that torch.compile takes a step that calls them into its graph.

In a traced graph the public functions call these forms, which change nothing, and copy the results into place; outside
they call the kernels directly. Nothing here can be differentiated, as the public functions can't: their results have no
gradient history, whatever requires grad among the inputs.
"""

import torch
from torch import Tensor

from ssiuu_fast.ops.both_weight_gradients import WeightGradients, run_both_weight_gradients, two_of
from ssiuu_fast.ops.checks import check_written
from ssiuu_fast.ops.neuron_attribution import NeuronAttribution, run_neuron_attribution
from ssiuu_fast.ops.neuron_penalty import NeuronPenalty, attribution_form, run_neuron_penalty
from ssiuu_fast.ops.penalty import Options, PenaltyResult, run_penalty_
from ssiuu_fast.ops.weight_gradient_input import selected
from ssiuu_fast.ops.weighted_weight_gradient import run_weighted_weight_gradient

# Forms that mutate can be compiled wrongly (pytorch issue 198031). The schemas are written out: torch 2.6 can't read
# them off list[Tensor].


@torch.library.custom_op(
    "ssiuu_fast::penalty",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor[] parameters, Tensor[] references, Tensor?[] outs, float weight,"
    " Tensor? weight_tensor, float gradient_scale, bool one_sided, bool update_references, bool first, str backend)"
    " -> (Tensor[], Tensor[], Tensor, Tensor, Tensor, Tensor)",
)
def penalty(
    gradients,
    parameters,
    references,
    outs,
    weight,
    weight_tensor,
    gradient_scale,
    one_sided,
    update_references,
    first,
    backend,
):
    """penalty_ without writing: (what gradients or out become, references or none, three sums, non-finite counts).

    weight_tensor, where there is one, is the weight.
    """
    weight = weight if weight_tensor is None else weight_tensor
    options = Options(weight, gradient_scale, one_sided, update_references, first)
    written = [_target(*pair).clone() for pair in zip(gradients, outs, strict=True)]
    if options.update_references:
        references = [reference.clone() for reference in references]
    counts = torch.empty(len(gradients), dtype=torch.int64, device=gradients[0].device)
    sums = run_penalty_(
        [new if out is None else gradient for new, gradient, out in zip(written, gradients, outs, strict=True)],
        parameters,
        references,
        [None if out is None else new for new, out in zip(written, outs, strict=True)],
        options,
        counts,
        backend,
    )
    # an operator may not return what it was given
    references = references if options.update_references else []
    return written, references, sums.penalty, sums.negative, sums.gradient_square, counts


@penalty.register_fake
def _(gradients, parameters, references, outs, weight, weight_tensor, scale, one_sided, update_references, *rest):
    written = [torch.empty_like(_target(*pair)) for pair in zip(gradients, outs, strict=True)]
    references = [torch.empty_like(r) for r in references] if update_references else []
    square, negative = _fake_sums(gradients[0])
    counts = gradients[0].new_empty(len(gradients), dtype=torch.int64)
    return written, references, square, negative, torch.empty_like(square), counts


def traced_penalty_(gradients, parameters, references, outs, options, nonfinite_counts, backend) -> PenaltyResult:
    """penalty_ in a traced graph."""
    for i, reference in enumerate(references):
        if not isinstance(reference, Tensor):
            raise TypeError(
                f"references[{i}] is a {type(reference).__name__}, and torch.compile takes tensors only: call penalty_"
                " outside of the compiled function, or in one under torch.compiler.disable"
            )
    targets = [_target(*pair) for pair in zip(gradients, outs, strict=True)]
    for i, target in enumerate(targets):
        check_written(target, f"gradients[{i}]" if outs[i] is None else f"out[{i}]")
    if options.update_references:
        for i, reference in enumerate(references):
            check_written(reference, f"references[{i}]")
    if not gradients:
        return PenaltyResult(
            *(torch.zeros((), dtype=dtype) for dtype in (torch.float64, torch.int64, torch.float64, torch.int64))
        )
    with torch.no_grad():
        written, new_references, square, negative, gradient_square, counts = torch.ops.ssiuu_fast.penalty(
            list(gradients),
            list(parameters),
            list(references),
            list(outs),
            *_number_and_tensor(options.weight),
            float(options.gradient_scale),
            options.one_sided,
            options.update_references,
            options.first,
            backend,
        )
        for target, new in zip(targets, written, strict=True):
            target.copy_(new)
        # none are given where references stay
        for reference, new in zip(references, new_references, strict=False):
            reference.copy_(new)
        if nonfinite_counts is not None:
            nonfinite_counts.copy_(counts)
    return PenaltyResult(square, negative, gradient_square, counts.sum())


@torch.library.custom_op(
    "ssiuu_fast::neuron_attribution",
    mutates_args=(),
    schema="(Tensor hidden, Tensor gradient, Tensor? mask, str backend) -> (Tensor, Tensor, Tensor)",
)
def neuron_attribution(hidden, gradient, mask, backend):
    """neuron_attribution: (max, min, sum)."""
    return tuple(run_neuron_attribution(hidden, gradient, mask, backend))


@neuron_attribution.register_fake
def _(hidden, gradient, mask, backend):
    dtype, shape = attribution_form(hidden, per_sample=True)
    return tuple(hidden.new_empty(shape, dtype=dtype) for _ in range(3))


def traced_neuron_attribution(hidden, gradient, mask, backend) -> NeuronAttribution:
    """neuron_attribution in a traced graph."""
    with torch.no_grad():
        return NeuronAttribution(*torch.ops.ssiuu_fast.neuron_attribution(hidden, gradient, mask, backend))


@torch.library.custom_op(
    "ssiuu_fast::neuron_penalty",
    mutates_args=(),
    schema="(Tensor hidden, Tensor gradient, Tensor? reference, Tensor? mask, float weight, Tensor? weight_tensor,"
    " bool per_sample, bool one_sided, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def neuron_penalty(hidden, gradient, reference, mask, weight, weight_tensor, per_sample, one_sided, backend):
    """neuron_penalty without writing: (injection, attribution, penalty, negative)."""
    injection = gradient.clone(memory_format=torch.contiguous_format)
    weight = weight if weight_tensor is None else weight_tensor
    return tuple(run_neuron_penalty(hidden, injection, reference, mask, weight, per_sample, one_sided, backend))


@neuron_penalty.register_fake
def _(hidden, gradient, reference, mask, weight, weight_tensor, per_sample, one_sided, backend):
    dtype, shape = attribution_form(hidden, per_sample)
    injection = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return injection, hidden.new_empty(shape, dtype=dtype), *_fake_sums(hidden)


def traced_neuron_penalty(hidden, gradient, reference, mask, weight, per_sample, one_sided, backend) -> NeuronPenalty:
    """neuron_penalty in a traced graph."""
    check_written(gradient, "gradient")
    with torch.no_grad():
        injection, *sums = torch.ops.ssiuu_fast.neuron_penalty(
            hidden,
            gradient,
            reference,
            mask,
            *_number_and_tensor(weight),
            bool(per_sample),
            bool(one_sided),
            backend,
        )
        gradient.copy_(injection)
    return NeuronPenalty(gradient, *sums)


@torch.library.custom_op(
    "ssiuu_fast::weighted_weight_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor input, Tensor weights, str backend) -> Tensor",
)
def weighted_weight_gradient(gradient, input, weights, backend):
    """weighted_weight_gradient of all samples that it is given."""
    return run_weighted_weight_gradient(gradient, input, weights, None, None, backend)


@weighted_weight_gradient.register_fake
def _(gradient, input, weights, backend):
    return gradient.new_empty(gradient.shape[-1], input.shape[-1])


def traced_weighted_weight_gradient(gradient, input, weights, rows, out, backend) -> Tensor:
    """weighted_weight_gradient in a traced graph; float32 `out` receives what is rounded to the dtype of gradient."""
    if out is not None:
        check_written(out, "out")
    with torch.no_grad():
        chosen = selected(rows, gradient, input, weights)
        result = torch.ops.ssiuu_fast.weighted_weight_gradient(*chosen, backend)
        return result if out is None else out.add_(result)


@torch.library.custom_op(
    "ssiuu_fast::both_weight_gradients",
    mutates_args=(),
    schema="(Tensor gradient, Tensor input, Tensor weights, str backend) -> (Tensor, Tensor)",
)
def both_weight_gradients(gradient, input, weights, backend):
    """both_weight_gradients: (plain, weighted)."""
    return tuple(run_both_weight_gradients(gradient, input, weights, None, None, backend))


@both_weight_gradients.register_fake
def _(gradient, input, weights, backend):
    return tuple(gradient.new_empty(gradient.shape[-1], input.shape[-1]) for _ in range(2))


def traced_both_weight_gradients(gradient, input, weights, rows, out, backend) -> WeightGradients:
    """both_weight_gradients in a traced graph; `rows` only says which weights are 0."""
    outs = two_of(out)
    for place, target in enumerate(outs):
        if target is not None:
            check_written(target, f"out[{place}]")
    with torch.no_grad():
        results = torch.ops.ssiuu_fast.both_weight_gradients(gradient, input, weights, backend)
        pairs = zip(outs, results, strict=True)
        return WeightGradients(*(result if out is None else out.add_(result) for out, result in pairs))


def _mark_results(ctx, inputs, output):
    results = output if isinstance(output, tuple) else (output,)
    lists = [result if isinstance(result, list) else [result] for result in results]
    ctx.mark_non_differentiable(*(tensor for tensors in lists for tensor in tensors))


def _no_backward(ctx, *gradients):
    raise RuntimeError("the operators of ssiuu_fast can't be differentiated")


# without these, results would ask for a backward that there isn't wherever an input requires grad
for _operator in (penalty, neuron_attribution, neuron_penalty, weighted_weight_gradient, both_weight_gradients):
    _operator.register_autograd(_no_backward, setup_context=_mark_results)


def _target(gradient, out):
    return gradient if out is None else out


def _fake_sums(like):
    return like.new_empty((), dtype=torch.float64), like.new_empty((), dtype=torch.int64)


def _number_and_tensor(weight):
    """A schema has no type for either."""
    return (0.0, weight) if isinstance(weight, Tensor) else (float(weight), None)
