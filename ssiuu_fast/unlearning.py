"""The unlearning loop: an objective, the penalty beside it, and an early stop at the forget threshold."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from ssiuu_fast.data.collate import Encoded, collate
from ssiuu_fast.frozen import refuse_reentrant
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.log_probs import answer_log_probs
from ssiuu_fast.objectives.objective import ForgetBatch, Objective, Totals
from ssiuu_fast.ops.sequence_log_probs import answer_token_counts
from ssiuu_fast.regularizer import SSIUURegularizer
from ssiuu_fast.sampling import epoch_batches, steps_per_epoch, wrapping_batch
from ssiuu_fast.share import too_small
from ssiuu_fast.training import clip, new_optimizer, on_device


@dataclass
class Progress:
    """What an unlearning run did.

    scores: forget score before the first step and after every epoch. kept_epoch: the epoch of the weights that the
    model ends with; the last one, or where the threshold wasn't reached, the one with the lowest score.
    """

    threshold: float
    scores: list[float] = field(default_factory=list)
    steps: int = 0
    kept_epoch: int = 0
    stopped_by: str = "max_epochs"  # "threshold" | "max_epochs" | "divergence" | "already_met"
    # None where the share isn't known, which is so at neuron granularity once λ is fixed
    penalty_shares: list[float | None] = field(default_factory=list)
    weight: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return self.stopped_by in ("threshold", "already_met")

    @property
    def epochs(self) -> int:
        return len(self.scores) - 1

    @property
    def score(self) -> float:
        """The forget score of the weights that the model ends with."""
        return self.scores[self.kept_epoch]

    @property
    def penalty_share(self) -> float | None:
        """Mean over the steps of ‖λ ∂R/∂φ‖ ÷ norm of the whole gradient before clipping; 0 without a penalty.

        None if it isn't known in every step.
        """
        if None in self.penalty_shares:
            return None
        return sum(self.penalty_shares) / len(self.penalty_shares) if self.penalty_shares else 0.0

    def as_dict(self) -> dict:
        """Everything as JSON-ready values."""
        derived = ("reached", "epochs", "score", "penalty_share")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def unlearn(
    model: nn.Module,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded] | None,
    *,
    objective: str,
    learning_rate: float,
    threshold: float,
    forget_score: Callable[[], float],
    regularizer: SSIUURegularizer | None = None,
    max_epochs: int = 20,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
    description: str | None = None,
) -> Progress:
    """Unlearns in place until forget_score() ≤ threshold, asked before the first step and after every epoch.

    Every step takes batch_size forget rows (the sampler wraps around) and as many retain rows; an epoch is
    one pass over the forget set. micro_batch_size splits both without changing the result. `log` receives one dict a
    step and one an evaluation. A run that never reaches the threshold, or whose gradient stops being a number, ends
    with the weights of its lowest score, and says so in `notes`.

    Raises ValueError for an unknown objective, an empty forget set, an objective without the retain rows it needs,
    micro-batches that the regulariser can't take, or reentrant gradient checkpointing, which may train nothing.
    """
    terms = make_objective(objective)
    if not forget:
        raise ValueError("the forget set is empty")
    if terms.needs_retain and not retain:
        raise ValueError(f"{terms.name} needs retain rows and there are none: give a retain set, or use objective 'ga'")
    refuse_reentrant(model)
    split = micro_batch_size is not None and micro_batch_size < batch_size
    if split and regularizer is not None and not regularizer.takes_micro_batches:
        raise ValueError(
            f"micro_batch_size={micro_batch_size} is smaller than batch_size={batch_size}: neurons with "
            "reference='previous' have attributions that are sums over the whole batch. Leave micro_batch_size out, or "
            "use reference='initial'"
        )
    log = log or (lambda row: None)
    progress = Progress(threshold, [forget_score()])
    log({"epoch": 0, "forget_score": progress.scores[0]})
    if progress.scores[0] <= threshold:
        progress.stopped_by = "already_met"
        progress.notes.append(
            f"the forget score is {progress.scores[0]:.3f} before the first step, already at or under the threshold "
            f"{threshold:.3f}: nothing was unlearned. Does the model know what it is to forget?"
        )
        return progress

    stepper = _Stepper(model, forget, retain, terms, regularizer, learning_rate, batch_size, micro_batch_size, seed)
    if regularizer is not None and regularizer.reference == "initial":
        stepper.set_reference()
    best = _Best(model, progress.scores[0])
    per_epoch = steps_per_epoch(len(forget), batch_size)
    with tqdm(total=max_epochs * per_epoch, desc=description, disable=description is None) as bar:
        try:
            for epoch in range(1, max_epochs + 1):
                for _ in range(per_epoch):
                    row = stepper.step(progress.steps)
                    progress.steps += 1
                    if regularizer is not None:
                        progress.penalty_shares.append(row["penalty_share"])
                    log(row)
                    bar.update()
                progress.scores.append(forget_score())
                log({"epoch": epoch, "step": progress.steps, "forget_score": progress.scores[-1]})
                bar.set_postfix(forget=f"{progress.scores[-1]:.3f}", threshold=f"{threshold:.3f}")
                best.offer(progress.scores[-1], epoch)
                if progress.scores[-1] <= threshold:
                    progress.stopped_by = "threshold"
                    break
        except FloatingPointError as error:
            progress.stopped_by = "divergence"
            progress.notes.append(f"after step {progress.steps}: {error}")
    if not progress.reached:
        best.restore()
    progress.kept_epoch = best.epoch
    progress.notes += _notes(progress, regularizer)
    progress.weight = None if regularizer is None else regularizer.weight
    model.eval()
    return progress


class _Stepper:
    """One optimizer step: forget micro-batches with the penalty, then retain micro-batches."""

    def __init__(
        self, model, forget, retain, terms: Objective, regularizer, learning_rate, batch_size, micro_batch_size, seed
    ):
        self.model = model
        self.forget = forget
        self.retain = retain
        self.terms = terms
        self.regularizer = regularizer
        self.optimizer = new_optimizer(model, learning_rate)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size
        self.seed = seed
        self.device = next(model.parameters()).device

    def step(self, number: int) -> dict:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        row = {"step": number + 1, "forget_nll": self._forget(number)}
        if self.terms.needs_retain:
            row["retain_nll"] = self._retain(number)
        if self.regularizer is not None and self.regularizer.relative_weight is not None:
            self.regularizer.after_backward()
        row["gradient_norm"] = clip(self.model)
        if not math.isfinite(row["gradient_norm"]):
            raise FloatingPointError(f"the gradient's norm is {row['gradient_norm']}")
        if self.regularizer is not None:
            row |= _penalty_figures(self.regularizer, row["gradient_norm"])
        self.optimizer.step()
        return row

    def set_reference(self) -> None:
        """reference="initial": one pass over the forget set, in evaluation mode, at the starting weights."""
        self.model.eval()
        self.regularizer.set_reference(
            self._reference_item(indices)
            for indices in epoch_batches(len(self.forget), self.micro_batch_size, self.seed, 0)
        )

    def _reference_item(self, indices):
        batch = on_device(collate([self.forget[index] for index in indices]), self.device)
        return answer_log_probs(self.model, batch), answer_token_counts(batch["labels"]), torch.tensor(indices)

    def _forget(self, number: int) -> float:
        parts, sample_ids, totals = self._micro_batches(self.forget, self.seed, number)
        total = 0.0
        for index, part in enumerate(parts):
            batch = ForgetBatch(part, samples=len(part["labels"]))
            loss, log_probs = self.terms.forget_loss(self.model, batch, totals)
            if not log_probs.isfinite().all():
                raise FloatingPointError("a log-probability of the forget batch is not a number")
            if self.regularizer is not None:
                counts = answer_token_counts(part["labels"])
                self.regularizer.backward(
                    log_probs, last=index == len(parts) - 1, token_counts=counts, sample_ids=sample_ids[index]
                )
            loss.backward()
            total -= log_probs.detach().sum().item()
        return total / totals.tokens

    def _retain(self, number: int) -> float:
        # another stream of draws than the forget rows
        parts, _, totals = self._micro_batches(self.retain, self.seed + 500_000, number)
        total = 0.0
        for part in parts:
            loss = self.terms.retain_loss(self.model, part, totals)
            loss.backward()
            total += loss.item()
        return total

    def _micro_batches(self, rows, seed: int, number: int):
        """The batches, the indices of their rows, and what all hold together."""
        indices = torch.tensor(wrapping_batch(len(rows), self.batch_size, seed, number)).split(self.micro_batch_size)
        parts = [on_device(collate([rows[index] for index in some.tolist()]), self.device) for some in indices]
        tokens = sum(int(answer_token_counts(part["labels"]).sum()) for part in parts)
        return parts, indices, Totals(samples=sum(map(len, indices)), tokens=tokens)


class _Best:
    """The weights of the lowest score so far, in host memory; the starting weights until a step improves on them."""

    def __init__(self, model: nn.Module, score: float):
        self.model = model
        self.epoch = 0
        self.score = score
        self._keep()

    def offer(self, score: float, epoch: int) -> None:
        if score < self.score:
            self.score, self.epoch = score, epoch
            self._keep()

    def restore(self) -> None:
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._weights[name])

    def _keep(self) -> None:
        self._weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        # the rest, which may be quantised, stays as it is
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


def _penalty_figures(regularizer: SSIUURegularizer, gradient_norm: float) -> dict:
    share = regularizer.penalty_share(gradient_norm)
    if regularizer.step_was_skipped:
        return {"penalty": None, "penalty_share": share}
    last = regularizer.last_step
    now_and_then = {} if last.relative_change is None else {"relative_change": last.relative_change}
    if last.absent:
        now_and_then["absent"] = last.absent
    return now_and_then | {
        "penalty": last.penalty,
        "penalty_norm": last.added_norm,
        "penalty_share": share,
        "weight": last.weight,
        "negative_share": last.negative_share,
        "underflows": last.underflows,
        "nonfinite": last.nonfinite,
    }


def _notes(progress: Progress, regularizer: SSIUURegularizer | None) -> list[str]:
    notes = []
    kept = f"kept is epoch {progress.kept_epoch} with the lowest forget score, {progress.score:.3f}"
    if progress.stopped_by == "max_epochs":
        notes.append(
            f"the threshold {progress.threshold:.3f} was not reached in {progress.epochs} epochs; {kept}. Raise the "
            "learning rate or max_epochs"
        )
    if progress.stopped_by == "divergence":
        notes.append(f"the run diverged; {kept}. Lower the learning rate or the penalty's weight")
    if regularizer is None:
        return notes
    if regularizer.weight is None:
        notes.append(
            "no penalty was ever applied: the run ended before λ was calibrated (4 steps with a penalty above 0)"
        )
    elif progress.penalty_share is not None and (
        reason := too_small(progress.penalty_share, regularizer.regularized_parameters)
    ):
        notes.append(reason)
    return notes
