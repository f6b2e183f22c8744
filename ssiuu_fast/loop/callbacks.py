"""What a run shows and hands over while it goes on, and what is done at its two ends."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ssiuu_fast.loop.progress import FORGET_SCORE


def show(trainer: Trainer, description: str | None) -> None:
    """A progress bar under this name, or nothing for None, in place of the rows that the Trainer prints."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if description is not None:
        trainer.add_callback(_Bar(description))


class HandOver(TrainerCallback):
    """Gives every row of the Trainer's log to `log`."""

    def __init__(self, log: Callable[[dict], None]):
        self._log = log

    def on_log(self, args, state, control, **kwargs):
        self._log(state.log_history[-1])


class Ends(TrainerCallback):
    """The two ends of a run, when the Trainer has wrapped the model, and before it returns."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.begin()
        self._trainer.flow.resume(state, control)

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.end()


@contextmanager
def quiet_about_no_steps() -> Iterator[None]:
    """A run that is over before its first step is no mistake of the data, which the Trainer takes it for."""

    def keeps(record: logging.LogRecord) -> bool:
        return "not to be a single sample" not in str(record.msg)

    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


class _Bar(ProgressCallback):
    """The Trainer's bar with the forget score beside it, and no rows in between."""

    def __init__(self, description: str):
        super().__init__()
        self._description = description

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        # on the first rank only
        if self.training_bar is not None:
            self.training_bar.set_description(self._description)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if FORGET_SCORE in (logs or {}) and self.training_bar is not None:
            self.training_bar.set_postfix(forget=f"{logs[FORGET_SCORE]:.3f}")
