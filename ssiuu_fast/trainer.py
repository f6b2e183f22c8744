"""Unlearning on transformers.Trainer: the objective and the penalty in its step, an early stop, whole checkpoints."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.frozen import refuse_reentrant
from ssiuu_fast.loop import checkpoints
from ssiuu_fast.loop.best import BestWeights
from ssiuu_fast.loop.callbacks import Ends, quiet_about_no_steps
from ssiuu_fast.loop.fingerprint import frozen_fingerprint
from ssiuu_fast.loop.flow import UnlearningFlow
from ssiuu_fast.loop.rows import read_rows
from ssiuu_fast.loop.scored_trainer import REFERENCE_LOG_PROBS, ScoredTrainer
from ssiuu_fast.loop.start import (
    reference_batches,
    refuse_half_weights,
    refuse_missing_weights,
    refuse_rows,
    threshold_of,
)
from ssiuu_fast.loop.step_log import StepLog, penalty_figures
from ssiuu_fast.loop.steps import Part, Steps
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.regularizer import SSIUURegularizer
from ssiuu_fast.regularizer_file import load_regularizer
from ssiuu_fast.shards import reshard, whole
from ssiuu_fast.trainer_config import UnlearningConfig


class UnlearningTrainer(ScoredTrainer):
    """Unlearns rows from a model by an objective, with the Ssiuu penalty, until it doesn't know them any more.

        trainer = UnlearningTrainer(model, UnlearningConfig(output_dir="run", relative_weight=30),
                                    forget=forget, retain=retain, processing_class=tokenizer)
        trainer.train()
        print(trainer.progress())

    forget, retain, test: rows to forget, to show while unlearning, and held out: `Example`s, mappings as in our JSON
        Lines, or tokenised rows (loop.rows.read_rows). test is only scored, in every evaluation.
    refusals: texts that DPO prefers to the answers; drawn for each row and pass.
    processing_class: the tokenizer; needed for texts.
    forget_score: gives the forget score of the model; left open, evaluation.scores.score of the forget texts. With one
        of your own give UnlearningConfig a threshold too: there is no early stop without.

    Every step has the same number of forget rows, drawn from (seed, step), whatever the number of ranks and
    micro-batches. The forget score is taken before the first step and as eval_strategy says; at or under the threshold
    the run ends. One that never gets there, or whose gradient stops being a number, ends with the weights of its lowest
    score; without a threshold, with those of the last step. `progress()` tells what happened.

    Raises ValueError for rows, options and models that can't work together, before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        args: UnlearningConfig,
        *,
        forget: Iterable,
        retain: Iterable | None = None,
        test: Iterable | None = None,
        refusals: Sequence[str] | None = None,
        processing_class=None,
        forget_score: Callable[[nn.Module], float] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        if not isinstance(args, UnlearningConfig):
            raise ValueError(f"args is a {type(args).__name__}: give an UnlearningConfig")
        self.objective = args.new_objective()
        self.encoder = None if processing_class is None else Encoder(processing_class, args.style, args.max_length)
        self.forget = read_rows(forget, self.encoder, "forget")
        self.retain = None if retain is None else read_rows(retain, self.encoder, "retain")
        self.test = None if test is None else read_rows(test, self.encoder, "test")
        refuse_rows(self.objective, self.forget, self.retain, self.test, refusals)
        refuse_half_weights(model, args)
        refuse_reentrant(model)
        self._refusals = refusals
        self._forget_score = forget_score
        self.threshold = threshold_of(args, self.forget, forget_score)

        # set to False in the model's config by the Trainer
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.forget.encoded,
            eval_dataset=self.forget.encoded,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("FSDP1 is not supported: its flat parameters can't be regularised one by one, use FSDP2")
        self.ranks = Ranks()
        self.steps = Steps(
            self.forget,
            self.retain if self.objective.needs_retain else None,
            batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            ranks=args.world_size,
            micro_batches=args.gradient_accumulation_steps,
            seed=self.args.rows_seed,
            pad_id=0 if self.encoder is None else self.encoder.pad_id,
        )
        self.regularizer: SSIUURegularizer | None = None
        self.flow = UnlearningFlow(self.threshold, self.steps.per_epoch)
        self._best: BestWeights | None = None
        self._step_log = StepLog(args.device)
        self._resumed: tuple[Path, dict | None, dict] | None = None
        self._staging: Path | None = None
        self._frozen_weights: str | None = None
        self.add_callback(self.flow)
        self.add_callback(Ends(self))

    # what a run is made of

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """As Trainer.train. True resumes from the last checkpoint of output_dir, bit by bit as if never interrupted.

        Raises ValueError for a checkpoint of another configuration, of other rows or on another base model.
        """
        run, bare = Path(self.args.output_dir), self.accelerator.unwrap_model(self.model)
        refuse_missing_weights(bare, self.ranks)
        if self._frozen_weights is None:
            # before anything is cast, sharded or frozen for the run; the first rank's weights are those that count
            self._frozen_weights = self.ranks.gather(frozen_fingerprint(bare))[0]
        folder = checkpoints.find(run, resume_from_checkpoint)
        if folder is None:
            checkpoints.refuse_older(run)
        self._resumed = None
        if folder is not None:
            self._resumed = (folder, *checkpoints.read_notes(folder, self._settings()))
        if self.args.should_save:
            checkpoints.sweep(run)
        self.flow.divergence = None
        if self._resumed is None:
            self.steps.reference_log_probs = None
            batch_size = self.args.per_device_train_batch_size
            self.objective.prepare(bare, self.forget.encoded, seed=self.args.rows_seed, batch_size=batch_size)
        else:
            state = dict(self._resumed[2])
            self.steps.reference_log_probs = state.pop(REFERENCE_LOG_PROBS, None)
            self.objective.load_state_dict(state, bare)
        # compiled code would give the buffers of a graph to the first of its two backward passes
        kept_buffers = torch._functorch.config.patch(donated_buffer=False) if self.args.torch_compile else nullcontext()
        try:
            with kept_buffers, quiet_about_no_steps():
                return super().train(
                    None if folder is None else str(folder), trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
                )
        finally:
            self.objective.release(self.accelerator.unwrap_model(self.model))
            if self._use_cache is not None:
                self.model.config.use_cache = self._use_cache

    def begin(self) -> None:
        """When the model is wrapped: the penalty, the reference log-probs, and what a checkpoint has of them."""
        # what is built now holds on to the shards
        reshard(self.model_wrapped)
        if self.objective.needs_refusals:
            self.steps.refusals = self._refusal_rows()
        if self.objective.needs_reference and self.steps.reference_log_probs is None:
            self.steps.reference_log_probs = self._reference_log_probs()
        self.regularizer = None
        if self.args.regularize:
            options = self.args.regularizer_options()
            if self._scaler is not None:
                # the scaler looks for its scale by steps that overflow, and leaves those out
                options["nonfinite"] = "count"
            self.regularizer = self.new_regularizer(self.model_wrapped, **options)
        if self.threshold is not None:
            self._best = BestWeights(self.accelerator.unwrap_model(self.model), self.ranks)
        if self._resumed is not None:
            folder, best, _ = self._resumed
            if self.regularizer is not None:
                load_regularizer(self.regularizer, folder / checkpoints.REGULARIZER)
            if self._best is not None and best is not None:
                kept = folder / checkpoints.BEST
                self._best.load(kept if kept.exists() else None, best)
        elif self.args.regularize and self.args.reference == "initial":
            self.model.eval()
            batches = reference_batches(
                self.model, self.steps, self.args.per_device_train_batch_size, self.ranks, self.args.device
            )
            self.regularizer.set_reference(batches)
        self._step_log = StepLog(self.args.device)

    def new_regularizer(self, model: nn.Module, **options) -> SSIUURegularizer:
        """The penalty on the wrapped model; for regularisers of one's own."""
        return SSIUURegularizer(model, **options)

    # a step

    def get_train_dataloader(self) -> DataLoader:
        """Only counts: what a micro-batch holds follows from the step's number (`get_batch_samples`)."""
        return DataLoader(range(self.steps.per_epoch * self.steps.micro_batches), batch_size=1)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device) -> tuple[list[Part], None]:
        if self.control.should_training_stop:
            return [], None
        step, rank = self.state.global_step, self.args.process_index
        return [self.steps.part(step, rank, number) for number in range(num_batches)], None

    def training_step(self, model: nn.Module, inputs: Part, num_items_in_batch=None) -> Tensor:
        """Forget rows with the penalty, then retain rows; each graph is freed before the next is built."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        part = inputs.to(self.args.device)
        loss, log_probs = self.objective.forget_loss(model, part.forget, part.forget_totals)
        if self._is_broken(log_probs):
            self.flow.divergence = "a log-probability of the forget batch is not a number"
            return torch.zeros_like(loss, dtype=torch.float32)
        if self.regularizer is None:
            self._scaled(loss).backward()
        else:
            self._send_back_penalised(loss, log_probs, part)
        self._step_log.add_share("forget_nll", -log_probs.detach().sum() / part.forget_totals.tokens)
        total = loss.detach()
        if part.retain is not None:
            loss = self.objective.retain_loss(model, part.retain, part.retain_totals)
            self._scaled(loss).backward()
            self._step_log.add_share("retain_loss", loss)
            total = total + loss.detach()
        if part.last:
            if self.regularizer is not None and self.regularizer.relative_weight is not None:
                self.regularizer.after_backward(self._scale)
            self.objective.finish_gradients(model)
            self._tokens_of_step = part.tokens_of_step
        # the Trainer takes the mean over ranks of what is a sum
        return total.float() * self.ranks.size

    def _send_back_penalised(self, loss: Tensor, log_probs: Tensor, part: Part) -> None:
        try:
            self.regularizer.backward(
                log_probs,
                last=part.last,
                scale=self._scale,
                token_counts=part.token_counts,
                sample_ids=part.sample_ids,
                loss=self._scaled(loss),
            )
        except FloatingPointError as error:
            # the other ranks may not know: go on to the end of the step, which is then not taken
            self.flow.divergence = str(error)

    def _scaled(self, loss: Tensor) -> Tensor:
        # losses are parts of a sum over ranks, and wrapped models take the mean
        loss = loss * self.ranks.size
        return loss if self._scaler is None else self._scaler.scale(loss)

    def _is_broken(self, log_probs: Tensor) -> bool:
        if self.flow.divergence is not None:
            return True
        # a GPU isn't waited for: there the gradient's norm will tell
        on_cpu = log_probs.device.type == "cpu"
        return on_cpu and self.ranks.agree(not bool(log_probs.isfinite().all()), log_probs.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        norm = whole(super()._get_grad_norm(model, grad_norm))
        self._judge_step(model, norm.item() if torch.is_tensor(norm) else norm)
        return norm

    def _judge_step(self, model: nn.Module, norm: float) -> None:
        """Looks at a complete gradient before the step is taken; a broken one is dropped, on every rank."""
        figures = {}
        try:
            if self.regularizer is not None and self.flow.divergence is None:
                figures = penalty_figures(self.regularizer, norm)
        except FloatingPointError as error:
            self.flow.divergence = str(error)
        # above scale 1 an overflow is the scaler's own affair
        if self.flow.divergence is None and not math.isfinite(norm) and self._scale <= 1:
            self.flow.divergence = f"the gradient's norm is {norm}"
        if self.ranks.agree(self.flow.divergence is not None, self.args.device):
            self.flow.divergence = self.flow.divergence or "another rank found numbers that are none"
            for parameter in model.parameters():
                parameter.grad = None
            return
        self._step_log.add_step(self._tokens_of_step, figures)

    @property
    def _scaler(self):
        return getattr(self.accelerator, "scaler", None)

    @property
    def _scale(self) -> float:
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def floating_point_ops(self, inputs: Part) -> int:
        parts = [part for part in (inputs.forget.inputs, inputs.retain) if part is not None]
        return sum(super(UnlearningTrainer, self).floating_point_ops(part) for part in parts)

    def _track_num_input_tokens(self, inputs: Part) -> None:
        if self.args.include_num_input_tokens_seen != "no" and inputs.last:
            self.state.num_input_tokens_seen += inputs.tokens_of_step

    # before the first step

    def _refusal_rows(self):
        from ssiuu_fast.data.refusals import RefusalRows

        return RefusalRows(
            lambda index, text: self.encoder.encode(self.forget.examples[index], answer=text),
            self._refusals,
            len(self.forget),
            seed=self.args.rows_seed,
            epochs=self.steps.passes(self.state.max_steps),
        )

    def _reference_log_probs(self) -> Tensor:
        from ssiuu_fast.objectives.reference import reference_log_probs

        refusals = [] if self.steps.refusals is None else self.steps.refusals.encoded
        with self.accelerator.autocast():
            return reference_log_probs(
                self.model_wrapped,
                [*self.forget.encoded, *refusals],
                self.args.reference_cache,
                batch_size=self.args.per_device_train_batch_size,
            )
