"""What an unlearning objective is: a loss on forget rows beside one on retain rows, for one micro-batch at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssiuu_fast.data.collate import Encoded

# what a checkpoint keeps of an objective
State = dict[str, Tensor | int | float | str]


@dataclass(frozen=True)
class Totals:
    """What a whole step holds, over its micro-batches and all ranks: means and NLL a token are divided by these.

    Those of the forget loss count the rows to forget alone, not the refusals beside them; those of the retain loss the
    retain rows.
    """

    samples: int
    tokens: int  # answer tokens
    attended: int = 0  # tokens of prompts and answers, without padding; only objectives on hidden states need it


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

    Made by name with `make_objective`. A training loop calls `prepare` once, then in every step the losses and, when
    all gradients are there, `finish_gradients`; at the end `release`.
    """

    name: ClassVar[str]
    needs_retain: ClassVar[bool] = True
    needs_refusals: ClassVar[bool] = False
    # log-probs of the starting model for every forget row (and refusal)
    needs_reference: ClassVar[bool] = False

    def refuse(self, arguments) -> None:
        """Raises ValueError where this objective can't keep its word under these TrainingArguments."""

    def prepare(self, model: nn.Module, forget: Sequence[Encoded], *, seed: int, batch_size: int) -> None:
        """Once, at the starting weights of the bare model, before regulariser and optimizer are made.

        Whatever is drawn comes from `seed`; passes over the forget rows take batch_size rows at a time. May set
        requires_grad of parameters, which `release` undoes. The same on every rank.

        Raises ValueError for a model or forget set that the objective can't work with, before anything has changed.
        """

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        """The loss of these rows, a scalar, and [samples] log-probs of the answers to forget from the same graph."""
        raise NotImplementedError

    def retain_loss(self, model: nn.Module, inputs: dict[str, Tensor], totals: Totals) -> Tensor:
        """The loss of these retain rows, a scalar. Only asked for where retain rows are needed."""
        raise NotImplementedError

    def finish_gradients(self, model: nn.Module) -> None:
        """Once a step, when objective and penalty are in `.grad`, before clipping. The model may be wrapped."""

    def release(self, model: nn.Module) -> None:
        """requires_grad of the bare model's parameters as it was before `prepare`."""

    def state_dict(self) -> State:
        """What a resumed run needs of the start, tensors and plain values; empty where that is nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str], model: nn.Module) -> None:
        """Takes back what `state_dict` gave, after `prepare` or in its place. model: bare, of the same architecture.

        Raises ValueError where the state isn't this objective's or doesn't fit the model.
        """
        if state:
            raise ValueError(f"{self.name} has no state, got {', '.join(state)}: is it another objective's?")


def require(option: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf) -> None:
    """Raises ValueError for an option that isn't a finite number in its range."""
    bound = f"a number above {above:g}" if above > -math.inf else "a number"
    bound = f"a number of at least {at_least:g}" if at_least > -math.inf else bound
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= above or value < at_least:
        raise ValueError(f"{option}={value!r}: must be {bound}")
