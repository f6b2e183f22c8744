"""The contestants of benchmarks/step.py: whole unlearning steps that differ in how the penalty is had.

All send the forget rows' loss back first, free that graph, and then do the retain rows. The objective is GD (METHOD):
-NLL_tok(forget) + NLL_tok(retain).
"""

import torch
from step_case import Setup, micro_batches
from torch import Tensor, nn

from ssiuu_fast import SSIUURegularizer, answer_token_counts, sequence_log_probs
from ssiuu_fast.selection import select_parameters

# literal: λ changes nothing about a step's time or memory
WEIGHT = 1e-3


class NotHere(Exception):
    """A contestant that can't run on this machine, or isn't built yet, and why."""


class Step:
    """GD alone, the base of all ratios."""

    # steps after which the same work begins again
    period = 1
    # whether R is to be that of Algorithm 1's transcription, and how near
    penalty_tolerance: float | None = None

    def __init__(self, setup: Setup, model: nn.Module | None = None):
        self.setup = setup
        self.model = setup.model if model is None else model
        # R of the last step; None where there is no penalty, or this step left it out
        self.penalty: Tensor | None = None

    def __call__(self, number: int) -> None:
        self.penalty = None
        count = self.setup.case.micro_batches
        forget, retain = (micro_batches(rows, count) for rows in self.setup.batches[number % len(self.setup.batches)])
        for index, (forget_rows, retain_rows) in enumerate(zip(forget, retain, strict=True)):
            self.send_back(forget_rows, retain_rows, last=index == count - 1)
        self.setup.optimizer.step()
        self.setup.optimizer.zero_grad()

    def send_back(self, forget: dict[str, Tensor], retain: dict[str, Tensor], last: bool) -> None:
        self.forget(forget, last)
        self.nll(self.log_probs(retain)).backward()

    def forget(self, rows: dict[str, Tensor], last: bool) -> None:
        (-self.nll(self.log_probs(rows))).backward()

    def log_probs(self, rows: dict[str, Tensor]) -> Tensor:
        return sequence_log_probs(self.model(input_ids=rows["input_ids"]).logits, rows["labels"])

    def nll(self, log_probs: Tensor) -> Tensor:
        return -log_probs.sum() / self.setup.answer_tokens

    def road(self) -> str:
        return ""

    def rows_taken(self) -> tuple[int, int] | None:
        """Forget rows that took part in the last penalty, and all of them; None where nobody says."""
        return None


def target_sum(log_probs: Tensor, labels: Tensor, target: str) -> Tensor:
    if target == "log_probability":
        return log_probs.sum()
    if target == "mean_token_probability":
        log_probs = log_probs / answer_token_counts(labels)
    return log_probs.exp().sum()


def plain_penalty(gradient: Tensor, parameter: Tensor, total: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1's lines of one parameter; adds to `total`, which is its .grad, and returns A and its part of R."""
    attribution = parameter * gradient
    difference = torch.where(attribution < 0, attribution - previous, 0)
    total += 2 * WEIGHT * difference * gradient
    return attribution, difference.square().sum()


class Plain(Step):
    """Algorithm 1 as one would write it from the paper."""

    penalty_tolerance = 0.0

    def __init__(self, setup: Setup, model: nn.Module | None = None):
        super().__init__(setup, model)
        self.parameters = list(select_parameters(setup.model, None).values())
        self.previous: list[Tensor] | None = None
        self.sums: list[Tensor] | None = None
        self.penalty_of = plain_penalty

    def forget(self, rows, last):
        log_probs = self.log_probs(rows)
        target = target_sum(log_probs, rows["labels"], self.setup.case.target)
        gradients = torch.autograd.grad(target, self.parameters, retain_graph=True)
        if self.sums is not None:
            gradients = [total + gradient for total, gradient in zip(self.sums, gradients, strict=True)]
        (-self.nll(log_probs)).backward()
        self.sums = None if last else gradients
        if last:
            self.regularize(gradients)

    @torch.no_grad()
    def regularize(self, gradients):
        first = self.previous is None
        kept = [] if first else self.previous
        self.penalty = torch.zeros((), device=self.setup.device)
        for index, (gradient, parameter) in enumerate(zip(gradients, self.parameters, strict=True)):
            if first:
                kept.append(parameter * gradient)
                continue
            kept[index], penalty = self.penalty_of(gradient, parameter, parameter.grad, kept[index])
            self.penalty += penalty
        self.previous = kept


def compiled(model: nn.Module) -> nn.Module:
    # two backward passes over one graph; before the first one is compiled
    torch._functorch.config.donated_buffer = False
    return torch.compile(model, dynamic=False)


class Compiled(Step):
    """GD alone, its model compiled: what compiling gives without any penalty."""

    def __init__(self, setup: Setup):
        super().__init__(setup, compiled(setup.model))


class PlainCompiled(Plain):
    """The transcription, with model and elementwise part compiled."""

    penalty_tolerance = 1e-3

    def __init__(self, setup: Setup):
        super().__init__(setup, compiled(setup.model))
        self.penalty_of = torch.compile(plain_penalty, dynamic=False)


class Regularized(Step):
    """With SSIUURegularizer; two backward passes over the forget graph."""

    penalty_tolerance = 1e-3
    options: dict = {}

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.regularizer = SSIUURegularizer(setup.model, WEIGHT, target=setup.case.target, **self.options)
        self.period = self.regularizer.every
        # of the last step that had a penalty
        self._road, self._kept, self._rows = "", None, 0

    def forget(self, rows, last):
        log_probs = self.log_probs(rows)
        penalty = self.regularizer.backward(log_probs, last=last, token_counts=answer_token_counts(rows["labels"]))
        self.keep(penalty, len(log_probs))
        (-self.nll(log_probs)).backward()

    def keep(self, penalty, rows):
        if self.regularizer.step_was_skipped:
            return
        self.penalty = penalty
        self._road, self._kept, self._rows = self.regularizer.road, self.regularizer.kept_rows, rows

    def road(self):
        return self._road

    def rows_taken(self):
        # two backward passes take every row, whatever its P
        return None if self._kept is None else (self._kept, self._rows)


class Neurons(Regularized):
    """The penalty on neurons: two passes, of which the loss's carries the penalty."""

    penalty_tolerance = None
    options = {"granularity": "neuron"}


class OneBackward(Regularized):
    """The regulariser sends the loss back itself."""

    def forget(self, rows, last):
        log_probs = self.log_probs(rows)
        counts = answer_token_counts(rows["labels"])
        loss = -self.nll(log_probs)
        self.keep(self.regularizer.backward(log_probs, loss=loss, last=last, token_counts=counts), len(log_probs))


class EightBits(OneBackward):
    penalty_tolerance = 0.1
    options = {"state_dtype": "8bit"}


class SixteenBits(OneBackward):
    penalty_tolerance = 0.05
    options = {"state_dtype": torch.bfloat16}


class Offload(OneBackward):
    """References in host memory."""

    options = {"offload": True}

    def __init__(self, setup: Setup):
        if setup.device.type == "cpu":
            raise NotHere("no GPU: the same memory")
        super().__init__(setup)


class EveryFourth(OneBackward):
    """Its time is the mean over whole cycles of four steps."""

    options = {"every": 4}


class SharedForward(OneBackward):
    """Forget and retain rows in one forward pass, the loss over both, sent back in one call."""

    def send_back(self, forget, retain, last):
        rows = {name: torch.cat([forget[name], retain[name]]) for name in forget}
        # cut before the loss is formed, so that the loss's graph holds the forget rows' log-probs
        answers, retained = self.log_probs(rows).chunk(2)
        counts = answer_token_counts(forget["labels"])
        loss = self.nll(retained) - self.nll(answers)
        self.keep(self.regularizer.backward(answers, loss=loss, last=last, token_counts=counts), len(answers))


class Peer(Step):
    """A GradDiff step without a penalty, in the shape of OpenUnlearning's loss code on transformers.

    Loss of each batch from the model itself, their weighted sum sent back at once, both graphs alive until then.
    """

    gamma = alpha = 1.0

    def send_back(self, forget, retain, last):
        forget_loss = self.model(**forget).loss
        retain_loss = self.model(**retain).loss
        loss = -self.gamma * forget_loss + self.alpha * retain_loss
        (loss / self.setup.case.micro_batches).backward()


CONTESTANTS = {
    "gd": Step,
    "gd compiled": Compiled,
    "plain": Plain,
    "plain compiled": PlainCompiled,
    "two backwards": Regularized,
    "one backward": OneBackward,
    "one backward, 8-bit": EightBits,
    "one backward, bf16 state": SixteenBits,
    "one backward, offload": Offload,
    "one backward, every=4": EveryFourth,
    "one backward, shared forward": SharedForward,
    "neurons": Neurons,
    "peer": Peer,
}
