"""What an unlearning objective is: a loss on forget rows beside one on retain rows, for one micro-batch at a time."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Totals:
    """What a whole step holds, over its micro-batches and all ranks: means and NLL a token are divided by these."""

    samples: int
    tokens: int  # answer tokens


@dataclass(frozen=True)
class ForgetBatch:
    """Some forget rows of a step.

    inputs: input_ids, attention_mask, labels of `samples` rows to forget; where the objective needs refusals, these are
    followed in the same batch by as many rows that answer the same questions with a refusal.
    reference_log_probs: [rows of inputs], of the starting model, where the objective needs them.
    """

    inputs: dict[str, Tensor]
    samples: int
    reference_log_probs: Tensor | None = None


@dataclass
class Objective:
    """Minimise forget_loss + retain_loss, each summed over the micro-batches of a step. Fields are its options.

    Made by name with `make_objective`.
    """

    name: ClassVar[str]
    needs_retain: ClassVar[bool] = True
    needs_refusals: ClassVar[bool] = False
    # log-probs of the starting model for every forget row (and refusal)
    needs_reference: ClassVar[bool] = False

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        """The loss of these rows, a scalar, and [samples] log-probs of the answers to forget from the same graph."""
        raise NotImplementedError

    def retain_loss(self, model: nn.Module, inputs: dict[str, Tensor], totals: Totals) -> Tensor:
        """The loss of these retain rows, a scalar. Only asked for where retain rows are needed."""
        raise NotImplementedError
