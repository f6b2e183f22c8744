"""When an unlearning run evaluates, saves and stops: what the Trainer's own flow would do a little differently."""

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ssiuu_fast.loop.progress import FORGET_SCORE


class UnlearningFlow(TrainerCallback):
    """Evaluates before a checkpoint of the same step is written, and stops at the threshold or when a run diverges.

    The Trainer evaluates epochs when they are over, after the checkpoints of their last step: a run resumed from one
    would miss that evaluation, and the stop with it.

    threshold: None never stops. divergence: why the run diverged, set by whoever finds out, before the step is taken.
    """

    def __init__(self, threshold: float | None, steps_per_epoch: int):
        self.threshold = threshold
        self.divergence: str | None = None
        self._steps_per_epoch = steps_per_epoch
        self._evaluated_at: int | None = None
        self._saved_at: int | None = None

    def resume(self, state, control) -> None:
        """At the beginning of a run, with the history of a resumed one."""
        self._evaluated_at = self._saved_at = None
        evaluations = [row for row in state.log_history if FORGET_SCORE in row]
        if evaluations:
            self._evaluated_at = evaluations[-1]["step"]
            self._stop_at_threshold(evaluations[-1], control)
        if state.global_step:
            self._saved_at = state.global_step
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.divergence is not None:
            # the step was not taken
            state.global_step -= 1
            state.epoch = state.global_step / self._steps_per_epoch
            control.should_log = control.should_evaluate = control.should_save = False
            control.should_training_stop = True
            return
        whole_epoch = state.global_step % self._steps_per_epoch == 0 and state.epoch >= args.eval_delay
        if (args.eval_strategy == IntervalStrategy.EPOCH and whole_epoch) or (
            args.eval_strategy != IntervalStrategy.NO and state.global_step >= state.max_steps
        ):
            control.should_evaluate = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.divergence is not None or state.global_step == self._evaluated_at:
            control.should_evaluate = False
        if self.divergence is not None or state.global_step in (0, self._saved_at):
            control.should_save = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self._evaluated_at = state.global_step
        self._stop_at_threshold(metrics, control)

    def on_save(self, args, state, control, **kwargs):
        self._saved_at = state.global_step

    def _stop_at_threshold(self, metrics: dict, control) -> None:
        if self.threshold is not None and metrics[FORGET_SCORE] <= self.threshold:
            control.should_training_stop = True
