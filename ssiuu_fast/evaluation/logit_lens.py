"""Logit lens: in which layer does a model know the answer?

The hidden state that predicts the first answer token is read after every block by the final norm and the LM head of
the *original* model, so that an unlearned model can't hide an answer by changing how it is read out (METHOD, "Logit
lens" and open point 10).
"""

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssiuu_fast.data.collate import IGNORE, Encoder, length_sorted_batches
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation.forwards import evaluating

CHANCE = 0.5
# of Llama, Qwen, Mistral and Gemma; GPT-2; NeoX; Phi
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class LogitLens:
    """means[layer]: mean of P(gold) / (P(gold) + P(distractor)) after the block `layer`, over `pairs` samples.

    0.5 is chance (`CHANCE`), far below it over-unlearned. left_out: samples whose gold and distractor begin with the
    same token, which tell nothing.
    """

    means: list[float]
    pairs: int
    left_out: int


class Decoder:
    """The final norm and the LM head of a model as they are now: copies, that later training doesn't move.

    Raises ValueError where they aren't found, or where the model scales its logits in a way that isn't known here.
    """

    def __init__(self, model: nn.Module):
        model = _unwrapped(model)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            raise ValueError(
                f"{type(model).__name__}: the logit lens needs an LM head that is an nn.Linear with weights that "
                f"aren't quantised, this one is {type(head).__name__}"
            )
        for name in ("logit_scale", "logits_scaling"):
            if getattr(model.config, name, 1) not in (None, 1):
                raise ValueError(f"{type(model).__name__} scales its logits ({name}), which the logit lens doesn't do")
        # beside the head, nothing is read out of the model itself, whatever hooks it carries
        self.norm = deepcopy(final_norm(model))
        self.weight = head.weight.detach().clone()
        self.bias = None if head.bias is None else head.bias.detach().clone()
        self.softcap = getattr(model.config, "final_logit_softcapping", None)

    @torch.no_grad()
    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logit of one token for each hidden state, [samples, size] and [samples] → [samples]; fp32, fp64 for fp64."""
        device = self.weight.device
        # a LayerNorm takes nothing but its own dtype, and the model that is read may be in another
        dtype = next((parameter.dtype for parameter in self.norm.parameters()), hidden.dtype)
        normed = self.norm(hidden.to(device, dtype))
        tokens = tokens.to(device)
        exact = torch.float64 if normed.dtype == torch.float64 else torch.float32
        logits = (normed.to(exact) * self.weight[tokens].to(exact)).sum(dim=-1)
        if self.bias is not None:
            logits = logits + self.bias[tokens]
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def logit_lens(model: nn.Module, batches: Iterable[dict[str, Tensor]], decoder: Decoder) -> LogitLens:
    """How much likelier than a distractor the gold answer is after each block of `model`, read by `decoder`.

    P(gold) / (P(gold) + P(distractor)) of the first answer token, mean over samples; decoder is that of the original
    model. The norm is applied once: it is the input of the model's own final norm that is read after the last block.

    Args:
        batches: as for `attribute` (input_ids, attention_mask, labels with -100 outside the answer; padded left or
            right), with `distractors` beside them: int64 [samples], the first token of each sample's distractor.
            `lens_batches` makes them.

    Raises ValueError for a sample without an answer, or when gold and distractor begin alike in every sample,
    FloatingPointError for hidden states that aren't numbers.
    """
    norm = final_norm(_unwrapped(model))
    total, pairs, left_out = None, 0, 0
    with evaluating(model):
        for batch in batches:
            places, gold = _answer_starts(batch["labels"])
            distractors = batch["distractors"].to(gold.device)
            differ = gold != distractors
            left_out += int((~differ).sum())
            if not differ.any():
                continue
            hidden = _hidden_at(model, norm, batch, places)
            shares = torch.stack(
                [_share(decoder, layer[differ], gold[differ], distractors[differ]) for layer in hidden]
            )
            total = shares.sum(dim=1) if total is None else total + shares.sum(dim=1)
            pairs += int(differ.sum())
    if total is None:
        raise ValueError(
            f"in all {left_out} samples gold answer and distractor begin with the same token: nothing to compare"
        )
    if not total.isfinite().all():
        raise FloatingPointError("hidden states are not numbers, so there is nothing to read: the weights are broken")
    return LogitLens((total / pairs).tolist(), pairs, left_out)


def lens_batches(
    encoder: Encoder, examples: Sequence[Example], seed: int = 0, batch_size: int = 16
) -> Iterator[dict[str, Tensor]]:
    """Batches for `logit_lens`: the distractor is one of the false options, or another row's answer without them.

    Each is drawn from (seed, row) alone. Raises ValueError for a single row without options.
    """
    distractors = [_distractor(examples, index, seed) for index in range(len(examples))]
    rows = [encoder.encode(example) for example in examples]
    others = [encoder.encode(example, answer=answer) for example, answer in zip(examples, distractors, strict=True)]
    first = torch.tensor([next(label for label in row.labels if label != IGNORE) for row in others])
    for indices, batch in length_sorted_batches(rows, batch_size, pad_id=encoder.pad_id):
        yield batch | {"distractors": first[indices]}


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the LM head. Raises ValueError where none of the known names is there."""
    body = getattr(model, "base_model", model)
    for name in _FINAL_NORMS:
        if isinstance(getattr(body, name, None), nn.Module):
            return getattr(body, name)
    raise ValueError(
        f"{type(model).__name__}: no final norm was found ({type(body).__name__} has none of {', '.join(_FINAL_NORMS)})"
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that PEFT put its adapters into."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _answer_starts(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Place and token of the first label of each row."""
    answer = labels != IGNORE
    places = answer.int().argmax(dim=1)
    if (places == 0).any():
        raise ValueError("a sample has no answer, or nothing before it: no position predicts its first token")
    return places, labels[torch.arange(len(labels), device=labels.device), places]


def _hidden_at(model: nn.Module, norm: nn.Module, batch: dict[str, Tensor], places: Tensor) -> list[Tensor]:
    """The hidden state after each block, at the position that predicts the token at `places`: [samples, size] each."""
    device = next(model.parameters()).device
    mask = batch["attention_mask"].to(device)
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": mask}
    if "position_ids" in inspect.signature(_unwrapped(model).forward).parameters:
        # models with absolute positions count left padding otherwise
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    last: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, arguments: last.append(arguments[0]))
    try:
        outputs = model(**inputs, output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    # the first is the embedding, the last has been through the model's own norm
    states = [*outputs.hidden_states[1:-1], last[-1]]
    rows = torch.arange(len(places))
    return [state[rows.to(state.device), (places - 1).to(state.device)] for state in states]


def _share(decoder: Decoder, hidden: Tensor, gold: Tensor, distractors: Tensor) -> Tensor:
    # P(gold) / (P(gold) + P(distractor)): the other tokens cancel
    return torch.sigmoid(decoder.logits(hidden, gold) - decoder.logits(hidden, distractors)).double().cpu()


def _distractor(examples: Sequence[Example], index: int, seed: int) -> str:
    draw = random.Random(f"{seed} {index}")
    if examples[index].false_options:
        return draw.choice(examples[index].false_options)
    if len(examples) < 2:
        raise ValueError("a single row without false options has no distractor: give it options, or more rows")
    return examples[(index + draw.randrange(1, len(examples))) % len(examples)].answer
