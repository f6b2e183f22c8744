"""Objectives that are functions of the answers' log-probabilities (METHOD, "Baselines, exact forms")."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssiuu_fast.objectives.objective import ForgetBatch, Objective, Totals
from ssiuu_fast.ops.sequence_log_probs import sequence_log_probs


def answer_log_probs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B] log-probabilities of a batch's answers, with their graph."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return sequence_log_probs(logits, inputs["labels"])


def nll_per_token(log_probs: Tensor, tokens: int) -> Tensor:
    """NLL_tok: −Σ_s log P_s ÷ answer tokens of the step, in nats a token."""
    return -log_probs.sum() / tokens


@dataclass
class GradientAscent(Objective):
    """−NLL_tok(forget): minimising it makes the answers less likely."""

    name: ClassVar[str] = "GA"
    needs_retain: ClassVar[bool] = False

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        log_probs = answer_log_probs(model, batch.inputs)
        return -nll_per_token(log_probs, totals.tokens), log_probs


@dataclass
class GradientDifference(GradientAscent):
    """−NLL_tok(forget) + NLL_tok(retain), the paper's backbone (γ = α = 1)."""

    name: ClassVar[str] = "GD"
    needs_retain: ClassVar[bool] = True

    def retain_loss(self, model: nn.Module, inputs: dict[str, Tensor], totals: Totals) -> Tensor:
        return nll_per_token(answer_log_probs(model, inputs), totals.tokens)
