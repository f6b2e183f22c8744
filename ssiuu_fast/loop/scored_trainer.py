"""The part of UnlearningTrainer that says how a run is doing and keeps it: scores, progress, checkpoints."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from transformers import Trainer

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.loop import checkpoints
from ssiuu_fast.loop.best import BestWeights
from ssiuu_fast.loop.flow import UnlearningFlow
from ssiuu_fast.loop.progress import Progress, read_progress
from ssiuu_fast.loop.rows import Rows
from ssiuu_fast.loop.start import run_settings
from ssiuu_fast.loop.step_log import StepLog
from ssiuu_fast.loop.steps import Steps
from ssiuu_fast.objectives.objective import Objective
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.regularizer import SSIUURegularizer
from ssiuu_fast.regularizer_file import save_regularizer
from ssiuu_fast.shards import reshard
from ssiuu_fast.trainer_config import UnlearningConfig

REFERENCE_LOG_PROBS = "reference_log_probs"


class ScoredTrainer(Trainer):
    """A Trainer whose evaluations are forget scores, and whose checkpoints are whole and hold what unlearning needs.

    What it works with is set by UnlearningTrainer, which says what each is.
    """

    args: UnlearningConfig
    objective: Objective
    encoder: Encoder | None
    forget: Rows
    test: Rows | None
    threshold: float | None
    ranks: Ranks
    steps: Steps
    regularizer: SSIUURegularizer | None
    flow: UnlearningFlow
    _forget_score: Callable[[nn.Module], float] | None
    _refusals: Sequence[str] | None
    _best: BestWeights | None
    _step_log: StepLog
    # of the checkpoint that the run goes on from: its folder, numbers of the best weights, state of the objective
    _resumed: tuple[Path, dict | None, dict] | None
    # where a checkpoint is being written
    _staging: Path | None
    _frozen_weights: str | None

    def progress(self) -> Progress:
        """What the run did so far: scores, the weights it ends with, why it stopped, the penalty's share, notes."""
        regularizer = self.regularizer
        return read_progress(
            self.state.log_history,
            steps=self.state.global_step,
            epochs=self.state.global_step / self.steps.per_epoch,
            threshold=self.threshold,
            divergence=self.flow.divergence,
            stopped_early=not self.is_in_train and self.state.global_step < self.state.max_steps,
            regularized=regularizer is not None,
            weight=None if regularizer is None else regularizer.weight,
            parameters=() if regularizer is None else regularizer.regularized_parameters,
        )

    def end(self) -> None:
        """The weights that the run ends with."""
        if self._best is not None and not self.progress().reached:
            self._best.restore()
        self.model.eval()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._step_log.drain(self.ranks))
        super().log(logs, start_time)

    # scores

    def evaluate(
        self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """eval_forget_score, and eval_test_score where there are test texts; nothing where nothing can be scored.

        During training a score at or under the threshold ends the run, and so does a model whose output isn't numbers.
        """
        if eval_dataset is not None:
            raise ValueError("evaluate scores the forget and test rows of the trainer: leave eval_dataset out")
        if not self._scores_forget:
            return {}
        began = time.perf_counter()
        try:
            metrics = {f"{metric_key_prefix}_forget_score": self._score_forget()}
            if self.test is not None and self.test.examples is not None:
                metrics[f"{metric_key_prefix}_test_score"] = self._score(self.test)
        except FloatingPointError as error:
            if not self.is_in_train:
                raise
            self.flow.divergence = str(error)
            self.control.should_training_stop = True
            self.control.should_save = False
            return {}
        if self.is_in_train and self._best is not None:
            self._best.offer(
                metrics[f"{metric_key_prefix}_forget_score"], self.state.global_step, self.state.epoch or 0
            )
        self.log(metrics)
        if metric_key_prefix == "eval":
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._step_log.leave_out(time.perf_counter() - began)
        return metrics

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict[str, float]:
        # only the evaluation before the first step leaves the scheduler out
        if skip_scheduler and self._resumed is not None:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    @property
    def _scores_forget(self) -> bool:
        return self._forget_score is not None or self.forget.examples is not None

    def _score_forget(self) -> float:
        if self._forget_score is None:
            return self._score(self.forget)
        # what one rank found is what all go by
        found = self.ranks.gather(float(self._forget_score(self.model)))[0]
        reshard(self.model)
        if not math.isfinite(found):
            raise FloatingPointError(f"forget_score gave {found}")
        return found

    def _score(self, rows: Rows) -> float:
        size, longest = self.args.per_device_eval_batch_size, self.args.max_new_tokens
        return score(self.model, self.encoder, rows.examples, size, longest).mean

    # checkpoints

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        run, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with checkpoints.staged(run, name, self.ranks, self.args.should_save) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if not self.args.save_only_model:
                self._save_own(staging / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            checkpoints.rotate(run, self.args.save_total_limit)

    def _save_own(self, folder: Path) -> None:
        state = dict(self.objective.state_dict())
        if self.steps.reference_log_probs is not None:
            state[REFERENCE_LOG_PROBS] = self.steps.reference_log_probs
        checkpoints.write_notes(folder, self._settings(), self._best, state)
        if self.regularizer is not None:
            save_regularizer(self.regularizer, folder / checkpoints.REGULARIZER)

    def _settings(self) -> dict:
        return run_settings(self.args, self.steps, self.threshold, self._refusals, self._frozen_weights)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # not before it has its own name
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
