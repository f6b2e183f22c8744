"""Forward passes of a model that is only looked at, and how several processes share its rows.

Scores are the work of every rank: each calls the same function with the same rows, goes through its share of the
batches, and has the whole result in the end. A rank that calls alone waits for the others.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ssiuu_fast.agreement import Agreement
from ssiuu_fast.data.collate import IGNORE, Encoder, collate, length_sorted_indices
from ssiuu_fast.data.example import Example
from ssiuu_fast.engines import bare
from ssiuu_fast.ops.sequence_log_probs import sequence_log_probs
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.shards import sharded_modules

# of (its own rows, the rows that any rank works on at the same time): a value for each of its own
Work = Callable[[list[int], list[int]], Sequence]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in, and sharded as it was."""
    training = [module for module in model.modules() if module.training]
    sharded = sharded_modules(model)
    model.eval()
    try:
        # not inference_mode: what is kept from a forward pass, as FSDP2 keeps its buffers, is used in training again
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module in sharded:
            # the root stays gathered after a forward that no backward follows, and would train on stale shards
            module.reshard()


def forward_module(model: nn.Module) -> nn.Module:
    """The module to call: the user's own, under DistributedDataParallel, torch.compile and LoRA.

    An evaluation has no gradients to reduce, its shapes change too often to compile, and adapters inside the layers
    work without their wrapper. What FSDP2 shards is called from its root.
    """
    model = bare(model)
    adapted = hasattr(model, "get_base_model") and not model.active_peft_config.is_prompt_learning
    if adapted and not sharded_modules(model):
        return model.get_base_model()
    return model


def in_lockstep(model: nn.Module) -> bool:
    """Whether a forward pass needs all ranks at once, because each has only a shard of the weights."""
    return bool(sharded_modules(model)) and Ranks().size > 1


def over_ranks(model: nn.Module, lengths: Sequence[int], batch_size: int, work: Work, bar) -> list:
    """`work` on every row, longest rows first, by all ranks together; its values in row order, on every rank.

    Batches are dealt out in turn, no larger than what gives each rank one. Where ranks go in lock-step, one without a
    batch works on another's and drops the result.

    An error on one rank is raised on all; not in lock-step, where the others are inside a forward pass that can't end.
    """
    ranks = Ranks()
    agreement = Agreement(ranks)
    lockstep = in_lockstep(model)
    values = [None] * len(lengths)
    batches = list(length_sorted_indices(lengths, min(batch_size, max(1, -(-len(lengths) // ranks.size)))))
    own: list[int] = []
    with nullcontext() if lockstep else agreement.errors_together():
        for start in range(0, len(batches), ranks.size):
            together = batches[start : start + ranks.size]
            rows = [row for batch in together for row in batch]
            if ranks.rank < len(together):
                batch = together[ranks.rank]
                own += batch
                for row, value in zip(batch, work(batch, rows if lockstep else batch), strict=True):
                    values[row] = value
            elif lockstep:
                work(together[-1], rows)
            bar.update(len(rows))
        if not lockstep:
            agreement.sums()
    if batches:
        for found in ranks.gather([(row, values[row]) for row in own]):
            for row, value in found:
                values[row] = value
    return values


def log_probs_of_answers(
    model, encoder: Encoder, asked: Sequence[tuple[Example, str]], batch_size: int = 64, progress: bool = False
) -> tuple[list[float], list[int]]:
    """log P(answer | question) of each (example, answer), the sum over its tokens, and how many tokens these are.

    The end token counts as one of the answer's. Raises FloatingPointError, on every rank, for a model whose log-probs
    aren't numbers.
    """
    model = forward_module(model)
    rows = [encoder.encode(example, answer=answer) for example, answer in asked]
    lengths = [len(row.input_ids) for row in rows]

    def work(own: list[int], _) -> list[float]:
        return batch_log_probs(model, collate([rows[row] for row in own], encoder.pad_id)).double().tolist()

    with evaluating(model), progress_bar(progress, len(rows), "answers") as bar:
        log_probs = over_ranks(model, lengths, batch_size, work, bar)
    require_numbers(all(map(math.isfinite, log_probs)))
    return log_probs, [sum(label != IGNORE for label in row.labels) for row in rows]


def batch_log_probs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`sequence_log_probs` of a collated batch, on the model's device."""
    logits, labels = answer_logits(model, batch)
    return sequence_log_probs(logits, labels)


def answer_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, V] and labels [B, T] of the last T positions, which hold every answer of the batch."""
    device = device_of(model)
    labels = batch["labels"].to(device)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(own.forward).parameters:
        # logits are needed from just before the first answer token of the batch; long prompts need none
        first = int((batch["labels"] != IGNORE).any(dim=0).int().argmax())
        keep = labels.shape[1] - first + 1
        return model(**inputs, use_cache=False, logits_to_keep=keep).logits, labels[:, -keep:]
    return model(**inputs).logits, labels


def require_numbers(finite: bool) -> None:
    """Raises FloatingPointError where what a model gave isn't finite."""
    if not finite:
        raise FloatingPointError("the model's outputs are not numbers, so it has no score: its weights are broken")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def progress_bar(progress: bool, total: int, what: str):
    """A bar over rows that is empty without `progress`, and shown by the first rank alone."""
    from tqdm.auto import tqdm

    hidden = not progress or total == 0 or Ranks().rank != 0
    return tqdm(total=total, desc=what, unit="row", disable=hidden, leave=False)
