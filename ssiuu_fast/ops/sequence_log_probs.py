"""log P(y|x) of each sample from labels and logits, or from labels, the last hidden states and the head's weight."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# elements of logits handled at once (16 MB as fp32, and as much again in passing): they stay in a GPU's cache between
# one operator and the next, and at H = 4096 the product that forms them still is 34 GFLOP, which outlasts a launch
CHUNK_ELEMENTS = 4 * 1024 * 1024


def sequence_log_probs(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probability of the answer tokens of each sample: Σ_t log softmax(logits[b, t−1])[labels[b, t]].

    The sum runs over the positions t ≥ 1 with labels[b, t] ≠ ignore_index, as Hugging Face models shift
    (position t−1 predicts token t). METHOD: P(y|x) of eq. 1 is its exponential.

    logits: [B, T, V] fp32, bf16, fp16 or fp64, any strides. labels: [B, T] int64.
    Returns [B] fp32 in nats (fp64 for fp64 logits); 0 for a sample without answer tokens.

    Sums are formed in fp32 over chunks of positions, so the logits are never copied to fp32 as a whole; the
    gradient has the dtype of the logits. The backward may run twice over one graph (retain_graph=True), each time
    with any weights per sample; it can't be differentiated again.

    Raises ValueError for shapes that don't fit, for labels that aren't int64 and, on the CPU, for a label outside
    [0, V).
    """
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point of shape [B, T, V], got {logits.dtype} {list(logits.shape)}")
    _check_labels(labels, logits, "logits", logits.shape[2], ignore_index)
    return SequenceLogProbs.apply(logits[:, :-1], labels[:, 1:], ignore_index)


def sequence_log_probs_from_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """`sequence_log_probs` of the logits hidden @ weightᵀ + bias, which are never formed as a whole.

    hidden: [B, T, H], what the language model's head is given. weight: [V, H] and bias: [V] of the head, in the dtype
    of hidden; under autocast all three are cast as a head would cast them. labels: [B, T] int64.
    Returns [B] fp32 in nats (fp64 for fp64); 0 for a sample without answer tokens.

    Only the N positions that predict an answer token are multiplied, in the dtypes in which the head would do it, one
    slice of the vocabulary after the other, in the forward pass and again in the backward pass. Sums over the
    vocabulary are formed in fp32; an element of the weight's gradient is one sum over all positions, and needs no
    accumulator beside it. A frozen weight costs no gradient. Kept for the backward pass: N rows of hidden, N·H, and a
    normaliser each. It may run twice over one graph (retain_graph=True), each time with any weights per sample; it
    can't be differentiated again.

    On a GPU the caller waits once, for the number of answer tokens.

    Raises ValueError for shapes and dtypes that don't fit, for labels that aren't int64 and, on the CPU, for a label
    outside [0, V); elsewhere such a label makes its sample NaN.
    """
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point of shape [B, T, H], got {hidden.dtype} {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight must be of shape [V, {hidden.shape[2]}], as the head of hidden {list(hidden.shape)} has it, got "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be of shape [{weight.shape[0]}] like the weight's rows, got {list(bias.shape)}")
    _check_labels(labels, hidden, "hidden states", weight.shape[0], ignore_index)
    hidden, weight, bias = (_as_autocast(tensor) for tensor in (hidden, weight, bias))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}: cast one of them, as the head would")
    samples, positions = (labels[:, 1:] != ignore_index).nonzero(as_tuple=True)
    return HiddenLogProbs.apply(hidden, weight, bias, samples, positions, labels[samples, positions + 1])


def answer_token_counts(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Answer tokens of each sample that `sequence_log_probs` sums over: #{t ≥ 1 : labels[b, t] ≠ ignore_index}.

    labels: [B, T]. Returns [B] int64.
    """
    return (labels[:, 1:] != ignore_index).sum(dim=1)


class SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        counted = targets != ignore_index
        targets = targets.masked_fill(~counted, 0)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        normalisers = torch.empty(targets.shape, dtype=dtype, device=logits.device)
        token_log_probs = torch.empty_like(normalisers)
        for span in _spans(logits):
            chunk = logits[:, span].to(dtype)
            normalisers[:, span] = chunk.logsumexp(dim=-1)
            chosen = chunk.gather(-1, targets[:, span, None]).squeeze(-1)
            token_log_probs[:, span] = chosen - normalisers[:, span]
        ctx.save_for_backward(logits, targets, counted, normalisers)
        # samples and tokens, before the shift
        ctx.batch_shape = (logits.shape[0], logits.shape[1] + 1)
        # an ignored position may hold inf or NaN logits (padding of a masked row): it must not reach the sum
        return token_log_probs.masked_fill(~counted, 0.0).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, sample_weights: Tensor):
        logits, targets, counted, normalisers = ctx.saved_tensors
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for span in _spans(logits):
            # ∂ log p_y / ∂ logit_v = 1[v = y] − p_v
            chunk = torch.exp(logits[:, span].to(normalisers.dtype) - normalisers[:, span, None]).neg_()
            chosen = targets[:, span, None]
            chunk.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=chunk.dtype))
            chunk.mul_(sample_weights[:, None, None])
            chunk.masked_fill_(~counted[:, span, None], 0.0)
            gradient[:, span] = chunk
        return gradient, None, None


class HiddenLogProbs(torch.autograd.Function):
    """samples, positions, targets: [N] the places of hidden that predict an answer token, each once, and the token."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor, positions: Tensor, targets: Tensor
    ) -> Tensor:
        rows = hidden[samples, positions]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        normalisers = []
        # stays NaN for a target outside the vocabulary
        chosen = torch.full(targets.shape, torch.nan, dtype=dtype, device=hidden.device)
        for span in _slices(rows, weight):
            logits = _logits(rows, weight, bias, span).to(dtype)
            normalisers.append(logits.logsumexp(dim=-1))
            inside, columns = _within(targets, span, logits.shape[1])
            chosen = torch.where(inside, logits.gather(-1, columns[:, None]).squeeze(-1), chosen)
        normalisers = torch.stack(normalisers).logsumexp(dim=0)
        ctx.save_for_backward(rows, weight, bias, samples, positions, targets, normalisers)
        ctx.shape = hidden.shape
        ctx.batch_shape = tuple(hidden.shape[:2])
        token_log_probs = chosen.new_zeros(hidden.shape[:2])
        token_log_probs[samples, positions] = chosen - normalisers
        return token_log_probs.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, sample_weights: Tensor):
        rows, weight, bias, samples, positions, targets, normalisers = ctx.saved_tensors
        of_hidden, of_weight, of_bias = (_is_asked_for(ctx, index) for index in range(3))
        row_weights = sample_weights[samples, None]
        row_gradient = rows.new_zeros(rows.shape, dtype=normalisers.dtype) if of_hidden else None
        weight_gradient = torch.empty_like(weight) if of_weight else None
        bias_gradient = torch.empty_like(bias) if of_bias else None
        for span in _slices(rows, weight):
            # ∂ log p_y / ∂ logit_v = 1[v = y] − p_v
            gradient = _logits(rows, weight, bias, span).to(normalisers.dtype)
            gradient.sub_(normalisers[:, None]).exp_().neg_()
            inside, columns = _within(targets, span, gradient.shape[1])
            gradient.scatter_add_(-1, columns[:, None], inside[:, None].to(gradient.dtype))
            gradient.mul_(row_weights)
            if of_bias:
                bias_gradient[span] = gradient.sum(dim=0)
            gradient = gradient.to(rows.dtype)
            with _no_autocast(rows):
                if of_weight:
                    torch.mm(gradient.T, rows, out=weight_gradient[span])
                if of_hidden:
                    row_gradient += gradient @ weight[span]
        hidden_gradient = None
        if of_hidden:
            hidden_gradient = rows.new_zeros(ctx.shape)
            hidden_gradient[samples, positions] = row_gradient.to(rows.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


# the functions whose output is one number a sample, [B], in the order of the batch; their nodes have a batch_shape
ROW_FUNCTIONS = (SequenceLogProbs, HiddenLogProbs)


def _check_labels(labels: Tensor, scored: Tensor, what: str, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError unless they are tokens of the vocabulary at the [B, T] places of what is scored."""
    if labels.shape != scored.shape[:2]:
        raise ValueError(f"labels must be of shape {list(scored.shape[:2])} like the {what}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
        if wrong.numel():
            raise ValueError(
                f"label {wrong[0].item()} is outside the vocabulary of {vocabulary}: were the tokens made by this "
                f"model's tokenizer, and is every position outside the answer set to {ignore_index}?"
            )


def _spans(logits: Tensor) -> list[slice]:
    samples, positions, vocabulary = logits.shape
    length = max(1, CHUNK_ELEMENTS // max(1, samples * vocabulary))
    return [slice(start, start + length) for start in range(0, positions, length)]


def _slices(rows: Tensor, weight: Tensor) -> list[slice]:
    """Of the vocabulary. With many rows, as wide as they are: no larger than they, and few parts to add up."""
    width = max(1, rows.shape[1], CHUNK_ELEMENTS // max(1, rows.shape[0]))
    return [slice(start, start + width) for start in range(0, weight.shape[0], width)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, span: slice) -> Tensor:
    with _no_autocast(rows):
        return linear(rows, weight[span], None if bias is None else bias[span])


def _is_asked_for(ctx, index: int) -> bool:
    """Whether this backward pass leads to that input; needs_input_grad says whether any might."""
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:
        # it isn't told of a leaf that autograd.grad was asked for
        return True


def _within(targets: Tensor, span: slice, width: int) -> tuple[Tensor, Tensor]:
    """Which targets are in this slice of the vocabulary, and their columns there (some column for the others)."""
    columns = targets - span.start
    return (columns >= 0) & (columns < width), columns.clamp(0, width - 1)


def _as_autocast(tensor: Tensor | None) -> Tensor | None:
    """As autocast gives it to a matrix product; fp64 it leaves alone."""
    if tensor is None or tensor.dtype == torch.float64 or not is_autocast_available(tensor.device.type):
        return tensor
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _no_autocast(tensor: Tensor) -> AbstractContextManager:
    """The dtypes are settled: a backward pass under autocast must form the logits that the forward pass formed."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
