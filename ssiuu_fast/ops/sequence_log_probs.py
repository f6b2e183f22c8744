"""log P(y|x) of each sample from logits and labels."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# elements of logits handled at once (16 MB as fp32), unless one position of the batch is more
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
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must be of shape {list(logits.shape[:2])} like the logits, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[2]))]
        if wrong.numel():
            raise ValueError(
                f"label {wrong[0].item()} is outside the vocabulary of {logits.shape[2]}: were the tokens made by this "
                f"model's tokenizer, and is every position outside the answer set to {ignore_index}?"
            )
    return SequenceLogProbs.apply(logits[:, :-1], labels[:, 1:], ignore_index)


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


# their output is a number for each sample, in the batch's order, and their nodes in a graph have a batch_shape
ROW_FUNCTIONS = (SequenceLogProbs,)


def _spans(logits: Tensor) -> list[slice]:
    samples, positions, vocabulary = logits.shape
    length = max(1, CHUNK_ELEMENTS // max(1, samples * vocabulary))
    return [slice(start, start + length) for start in range(0, positions, length)]
