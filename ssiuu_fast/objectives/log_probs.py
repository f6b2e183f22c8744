"""Unlearning objectives as functions of the answers' log-probabilities (METHOD, "Baselines, exact forms").

Each is a forget term plus, where it has one, a retain term; both are written for one micro-batch and a number of answer
tokens counted over the whole step, so that the sum over micro-batches is the objective.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# (log-probs [B] of one micro-batch, answer tokens of the whole step) -> scalar
Term = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Objective:
    """name as in the literature; retain None: only the forget set is used."""

    name: str
    forget: Term
    retain: Term | None


def nll_per_token(log_probs: Tensor, tokens: int) -> Tensor:
    """NLL_tok: −Σ_s log P_s ÷ answer tokens of the step, in nats a token."""
    return -log_probs.sum() / tokens


def ascent(log_probs: Tensor, tokens: int) -> Tensor:
    """−NLL_tok: minimising it makes the answers less likely."""
    return -nll_per_token(log_probs, tokens)


OBJECTIVES = {
    # gradient ascent
    "ga": Objective("GA", forget=ascent, retain=None),
    # gradient difference, the paper's backbone (γ = α = 1)
    "gd": Objective("GD", forget=ascent, retain=nll_per_token),
}
