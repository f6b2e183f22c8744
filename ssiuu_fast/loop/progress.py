"""What an unlearning run did, read from the log that every checkpoint carries."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from torch import nn

from ssiuu_fast.share import too_small

FORGET_SCORE = "eval_forget_score"
PENALTY_SHARE = "penalty_share"
PENALTY_WEIGHT = "penalty_weight"


@dataclass
class Progress:
    """What an unlearning run did.

    scores: forget score of every evaluation, the one before the first step included. kept_epoch: the epoch of the
    weights that the model ends with; the last one, or where the threshold wasn't reached, the one with the lowest
    score. threshold None: the run had no early stop. penalty_shares: one a logged row with penalised steps, those of
    a fixed λ that `every` doesn't leave out; None where it isn't known, which is so at neuron granularity.
    """

    threshold: float | None
    scores: list[float] = field(default_factory=list)
    epochs: float = 0
    steps: int = 0
    kept_epoch: float = 0
    score: float | None = None
    stopped_by: str = "max_epochs"  # "threshold" | "max_epochs" | "divergence" | "already_met" | "callback"
    penalty_shares: list[float | None] = field(default_factory=list)
    weight: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return self.stopped_by in ("threshold", "already_met")

    @property
    def penalty_share(self) -> float | None:
        """Mean over the penalised steps of ‖every · λ ∂R/∂φ‖ ÷ norm of the whole gradient before clipping.

        0 without a penalised step, None if it isn't known in each of them.
        """
        if None in self.penalty_shares:
            return None
        return statistics.mean(self.penalty_shares) if self.penalty_shares else 0.0

    def as_dict(self) -> dict:
        """Everything as JSON-ready values."""
        return asdict(self) | {name: getattr(self, name) for name in ("reached", "penalty_share")}


def read_progress(
    history: Sequence[dict],
    *,
    steps: int,
    epochs: float,
    threshold: float | None,
    divergence: str | None = None,
    stopped_early: bool = False,
    regularized: bool = False,
    weight: float | None = None,
    parameters: Iterable[nn.Parameter] = (),
) -> Progress:
    """The progress of a run from TrainerState.log_history.

    steps, epochs: optimizer steps taken, and passes over the forget rows. divergence: why the run diverged.
    stopped_early: whether it is over before its last step; where no other reason is known, a callback ended it.
    regularized, weight, parameters: whether there was a penalty, its λ if it is fixed, and what it is on.
    """
    evaluations = [row for row in history if FORGET_SCORE in row]
    logged = [row for row in history if "loss" in row]
    progress = Progress(
        threshold, [row[FORGET_SCORE] for row in evaluations], epochs=_plain(epochs), steps=steps, weight=weight
    )
    if regularized and steps:
        # a run that logs no step tells nothing of them
        penalised = [row for row in logged if row.get(PENALTY_WEIGHT)] if logged else [{}]
        progress.penalty_shares = [row.get(PENALTY_SHARE) for row in penalised]
    if stopped_early:
        progress.stopped_by = "callback"
    if evaluations:
        _judge(progress, evaluations)
    if divergence is not None:
        progress.stopped_by = "divergence"
        progress.notes.append(f"after step {steps}: {divergence}")
    progress.notes += _notes(progress, regularized, parameters)
    return progress


def _judge(progress: Progress, evaluations: list[dict]) -> None:
    """Whether the threshold was reached, and which weights were kept."""
    kept = evaluations[-1]
    if progress.threshold is not None:
        if kept[FORGET_SCORE] <= progress.threshold:
            progress.stopped_by = "threshold" if progress.steps else "already_met"
        else:
            # the first of the lowest
            kept = min(evaluations, key=lambda row: row[FORGET_SCORE])
    progress.kept_epoch, progress.score = _plain(kept.get("epoch") or 0), kept[FORGET_SCORE]


def _notes(progress: Progress, regularized: bool, parameters: Iterable[nn.Parameter]) -> list[str]:
    if progress.stopped_by == "already_met":
        return [
            f"the forget score is {progress.scores[0]:.3f} before the first step, already at or under the threshold "
            f"{progress.threshold:.3f}: nothing was unlearned. Does the model know what it is to forget?"
        ]
    notes = []
    kept = "the weights are those of the last step"
    if progress.score is not None and progress.threshold is not None:
        kept = f"kept is epoch {progress.kept_epoch:g} with the lowest forget score, {progress.score:.3f}"
    if progress.scores and progress.threshold is None:
        notes.append("the run had no early stop, and keeps its last weights: give threshold to stop at a forget score")
    if progress.stopped_by == "max_epochs" and progress.scores and progress.threshold is not None:
        notes.append(
            f"the threshold {progress.threshold:.3f} was not reached in {progress.epochs:g} epochs; {kept}. Raise the "
            "learning rate or the number of epochs"
        )
    if progress.stopped_by == "callback":
        notes.append(f"a callback stopped the run after {progress.epochs:g} epochs (step {progress.steps}); {kept}")
    if progress.stopped_by == "divergence":
        notes.append(f"the run diverged; {kept}. Lower the learning rate or the penalty's weight")
    if not regularized:
        return notes
    if progress.weight is None:
        notes.append(
            "no penalty was ever applied: the run ended before λ was calibrated (4 steps with a penalty above 0)"
        )
    elif progress.penalty_share is not None and (reason := too_small(progress.penalty_share, parameters)):
        notes.append(reason)
    return notes


def _plain(epoch: float) -> float:
    """3 for 3.0: epochs are whole unless a run is evaluated more often."""
    epoch = round(epoch, 4)
    return int(epoch) if epoch == int(epoch) else epoch
