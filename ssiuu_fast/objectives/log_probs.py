"""Objectives that are functions of the answers' log-probabilities (METHOD, "Baselines, exact forms")."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ssiuu_fast.objectives.answer_head import answer_head, log_probs_in_head
from ssiuu_fast.objectives.objective import ForgetBatch, Objective, Totals, require
from ssiuu_fast.ops.sequence_log_probs import answer_token_counts, sequence_log_probs


def answer_log_probs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B] log-probabilities of a batch's answers, with their graph; without forming whole logits where `answer_head`
    finds that it is the same."""
    head = answer_head(model, inputs)
    if head is not None:
        return log_probs_in_head(model, head, inputs)
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
class BesideRetain(Objective):
    """γ · a loss on the forget rows + α · NLL_tok(retain)."""

    gamma: float = 1.0
    alpha: float = 1.0

    def __post_init__(self):
        require("gamma", self.gamma, above=0)
        require("alpha", self.alpha, at_least=0)

    def retain_loss(self, model: nn.Module, inputs: dict[str, Tensor], totals: Totals) -> Tensor:
        return self.alpha * nll_per_token(answer_log_probs(model, inputs), totals.tokens)


@dataclass
class GradientDifference(BesideRetain):
    """−γ NLL_tok(forget) + α NLL_tok(retain), the paper's backbone (γ = α = 1)."""

    name: ClassVar[str] = "GD"

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        log_probs = answer_log_probs(model, batch.inputs)
        return -self.gamma * nll_per_token(log_probs, totals.tokens), log_probs


@dataclass
class PreferenceObjective(BesideRetain):
    """γ · mean over forget samples of −(2/β) log σ(β z) + α NLL_tok(retain); kinds differ in z.

    The loss of a sample is −2 z where z is far below 0 and 0 where it is far above.
    """

    beta: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require("beta", self.beta, above=0)

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        rows = len(batch.inputs["labels"])
        if self.needs_refusals and rows != 2 * batch.samples:
            raise ValueError(
                f"{self.name} needs a refusal beside each of {batch.samples} rows to forget: inputs must hold "
                f"{2 * batch.samples} rows, refusals last, and hold {rows}"
            )
        if self.needs_reference:
            _require_reference(self.name, batch, rows)
        log_probs = answer_log_probs(model, batch.inputs)
        # cut before the loss: who asks how the loss depends on the answers alone finds them in its graph
        answers, refusals = log_probs[: batch.samples], log_probs[batch.samples :]
        losses = logsigmoid(self.beta * self.margin(answers, refusals, batch)) * (-2 / self.beta)
        return self.gamma * losses.sum() / totals.samples, answers

    def margin(self, answers: Tensor, refusals: Tensor, batch: ForgetBatch) -> Tensor:
        """z of each sample, [samples], from the log-probs of its answer and of its refusal, if the objective has it."""
        raise NotImplementedError


@dataclass
class NegativePreference(PreferenceObjective):
    """NPO: z = NLL_seq(f) − NLL_seq^ref(f) (arXiv 2404.05868)."""

    name: ClassVar[str] = "NPO"
    needs_reference: ClassVar[bool] = True

    def margin(self, answers: Tensor, refusals: Tensor, batch: ForgetBatch) -> Tensor:
        return batch.reference_log_probs.to(answers) - answers


@dataclass
class DirectPreference(PreferenceObjective):
    """DPO: z = (NLL_seq^ref − NLL_seq)(refusal) − (NLL_seq^ref − NLL_seq)(f) (arXiv 2305.18290)."""

    name: ClassVar[str] = "DPO"
    needs_refusals: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def margin(self, answers: Tensor, refusals: Tensor, batch: ForgetBatch) -> Tensor:
        of_answers, of_refusals = batch.reference_log_probs.to(answers).split(batch.samples)
        return (refusals - of_refusals) - (answers - of_answers)


@dataclass
class SimpleNegativePreference(PreferenceObjective):
    """SimNPO: z = NLL_seq(f)/|y| − δ, |y| the answer tokens of the sample; needs no reference (arXiv 2410.07163)."""

    name: ClassVar[str] = "SimNPO"

    gamma: float = 0.125
    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require("delta", self.delta)

    def margin(self, answers: Tensor, refusals: Tensor, batch: ForgetBatch) -> Tensor:
        return -answers / answer_token_counts(batch.inputs["labels"]) - self.delta


def _require_reference(name: str, batch: ForgetBatch, rows: int) -> None:
    reference = batch.reference_log_probs
    if reference is None:
        raise ValueError(
            f"{name} compares with the starting model: give ForgetBatch its reference_log_probs, from "
            "objectives.reference.reference_log_probs"
        )
    if reference.shape != (rows,):
        raise ValueError(
            f"reference_log_probs must hold one number for each of {rows} rows, got {list(reference.shape)}"
        )
