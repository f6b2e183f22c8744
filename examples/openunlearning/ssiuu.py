"""The Ssiuu penalty for OpenUnlearning's trainers; importing this file registers SSIUU and SSIUUNPO.

To put the penalty on another of its methods, name that beside Penalised and register it in the same way.
"""

from trainer import _register_trainer
from trainer.unlearn.grad_diff import GradDiff
from trainer.unlearn.npo import NPO

from ssiuu_fast import SSIUURegularizer, answer_token_counts, sequence_log_probs


class Penalised:
    """Adds λ ∂R/∂φ to the gradient of a trainer whose compute_loss returns the outputs of its forget rows.

    regularizer: the options of SSIUURegularizer.
    """

    def __init__(self, *args, regularizer, **kwargs):
        super().__init__(*args, **kwargs)
        self.regularizer_options = dict(regularizer)
        self.regularizer = None

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if len(loader) < self.args.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}, but an epoch has only "
                f"{len(loader)} batches: every step needs the same number of forget samples, so lower it"
            )
        return loader

    def compute_loss(self, model, inputs, return_outputs=False, **further):
        # the graphs of all losses are alive here, and backward comes next
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **further)
        if self.regularizer is None:
            # now, since the model has been wrapped
            self.regularizer = SSIUURegularizer(model, **self.regularizer_options)
        # losses on pairs return the outputs of both, those to forget last
        forget = outputs[-1] if isinstance(outputs, tuple) else outputs
        labels = inputs["forget"]["labels"]
        self.regularizer.backward(
            sequence_log_probs(forget.logits, labels),
            last=self.accelerator.sync_gradients,
            scale=self._loss_scale(),
            token_counts=answer_token_counts(labels),
        )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.regularizer.relative_weight is not None and self.accelerator.sync_gradients:
            self.regularizer.after_backward(self._loss_scale())
        return loss

    def log(self, logs, *further):
        if "loss" in logs:
            last = self.regularizer.last_step
            logs |= {
                "penalty": last.penalty,
                "penalty_norm": last.added_norm,
                "weight": last.weight,
                "negative_share": last.negative_share,
                "underflows": last.underflows,
            }
        super().log(logs, *further)

    def _loss_scale(self):
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()


class SSIUU(Penalised, GradDiff):
    """The paper's method: gradient difference with the penalty."""


class SSIUUNPO(Penalised, NPO):
    """NPO with the penalty."""


_register_trainer(SSIUU)
_register_trainer(SSIUUNPO)
