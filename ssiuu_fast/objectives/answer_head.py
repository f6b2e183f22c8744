"""A language model's head that gives out the log-probabilities of answers, in place of logits [B, T, V].

They are formed inside the model's own forward pass, where wrappers of it look for what was used, as
DistributedDataParallel does.
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssiuu_fast.adapters import is_adapted
from ssiuu_fast.engines import bare
from ssiuu_fast.ops.sequence_log_probs import sequence_log_probs_from_hidden
from ssiuu_fast.shards import sharded_modules

logger = logging.getLogger(__name__)
# what keeps the model around a head from passing on what it gives, if anything; and what was said of a model
_reasons: weakref.WeakKeyDictionary[nn.Linear, str] = weakref.WeakKeyDictionary()
_said: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
# of a row that is run to see whether it is
_TOKENS = 2


def answer_head(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Linear | None:
    """The head of a causal model of transformers whose logits are its head's, bit for bit; None for any other.

    The model may be in DistributedDataParallel and have adapters, though not on its head. Where it is compiled or
    sharded, or something else hooks into the head, the answer is None.

    What a model does to its logits is seen once, by two passes without gradient over the first tokens of the inputs;
    these run the hooks on the model's modules.
    """
    head, reason = plain_head(model)
    if head is not None:
        if head not in _reasons:
            _reasons[head] = _other_logits(bare(model), head, inputs["input_ids"][:1, :_TOKENS])
        reason = _reasons[head]
    if reason and _said.get(model) != reason:
        _said[model] = reason
        logger.info("log-probs of this %s are formed from its whole logits: %s", type(bare(model)).__name__, reason)
    return None if reason else head


def log_probs_in_head(model: nn.Module, head: nn.Linear, inputs: dict[str, Tensor]) -> Tensor:
    """[B] log-probabilities of a batch's answers, with their graph; head: of `answer_head`."""
    with head_replaced(head, lambda hidden: _log_probs(head, hidden, inputs["labels"])):
        return _forward(model, inputs["input_ids"], inputs["attention_mask"]).flatten()


def plain_head(model: nn.Module) -> tuple[nn.Linear | None, str]:
    """A causal model's head that is a linear module and nothing else; or None and the reason."""
    if any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl for module in model.modules()
    ):
        return None, "it is compiled"
    if sharded_modules(model):
        return None, "it is sharded"
    model = bare(model)
    model = model.get_base_model() if is_adapted(model) else model
    if not hasattr(type(model), "get_output_embeddings"):
        return None, "it is no language model of transformers"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None, f"its head is a {type(head).__name__}"
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head):
        return None, "something hooks into its head"
    return head, ""


@contextmanager
def head_replaced(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For one forward pass of the model."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _other_logits(model: nn.Module, head: nn.Linear, tokens: Tensor) -> str:
    """What keeps the model from passing on what its head gives, logits or log-probs; nothing where it does."""
    device = tokens.device
    # dropout must not take its random numbers from the run
    generators = {"devices": [] if device.type == "cpu" else [device]}
    if device.type != "cpu":
        generators["device_type"] = device.type
    with torch.no_grad(), torch.random.fork_rng(**generators):
        if not _passes_on(model, head, type(head).forward.__get__(head), tokens):
            return "they aren't what its head gives"
        try:
            passed = _passes_on(model, head, lambda hidden: _log_probs(head, hidden, tokens), tokens)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"it can't do with less ({error})"
    return "" if passed else "it does something to what its head gives"


def _passes_on(model: nn.Module, head: nn.Linear, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> bool:
    given = []

    def seen(hidden: Tensor) -> Tensor:
        given.append(forward(hidden))
        # the model may write into it
        return given[-1].clone()

    with head_replaced(head, seen):
        found = _forward(model, tokens, torch.ones_like(tokens))
    # those of 16 bits may have been widened
    same = len(given) == 1 and (found.dtype == given[0].dtype or (found.dtype, given[0].itemsize) == (torch.float32, 2))
    return same and torch.equal(found, given[0].to(found.dtype))


def _log_probs(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """With as many dimensions as logits have."""
    return sequence_log_probs_from_hidden(hidden, head.weight, labels, bias=head.bias)[:, None, None]


def _forward(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
