"""An unlearning run inside another program: no folder, nothing printed, every log row handed over."""

import tempfile
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example
from ssiuu_fast.loop.callbacks import HandOver, show
from ssiuu_fast.loop.progress import Progress
from ssiuu_fast.sampling import number_of_micro_batches, refuse_empty_micro_batches
from ssiuu_fast.trainer import UnlearningTrainer
from ssiuu_fast.trainer_config import UnlearningConfig


def unlearn(
    model: nn.Module,
    encoder: Encoder,
    forget: Sequence[Example],
    retain: Sequence[Example] | None,
    *,
    objective: str,
    learning_rate: float,
    threshold: float,
    objective_options: dict | None = None,
    penalty: Mapping | None = None,
    refusals: Sequence[str] | None = None,
    forget_score: Callable[[nn.Module], float] | None = None,
    max_epochs: int = 20,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    max_new_tokens: int = 200,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
    trainer: Callable[..., UnlearningTrainer] = UnlearningTrainer,
) -> Progress:
    """Unlearns in place by an UnlearningTrainer until the forget score ≤ threshold; see there.

    penalty: fields of UnlearningConfig such as {"relative_weight": 30}; None leaves the penalty out. micro_batch_size:
    rows at once, at most; the result is the same. log: receives every row of the Trainer's log.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and device.index:
        raise ValueError(
            f"the model is on {device}, and a Trainer takes the first GPU it sees: set CUDA_VISIBLE_DEVICES="
            f"{device.index} and leave the number out"
        )
    sets = {"forget": forget} | ({"retain": retain} if retain is not None else {})
    refuse_empty_micro_batches(batch_size, micro_batch_size, sets)
    micro_batches = number_of_micro_batches(batch_size, micro_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearningConfig(
            output_dir=folder,
            objective=objective,
            objective_options=objective_options,
            learning_rate=learning_rate,
            threshold=threshold,
            regularize=penalty is not None,
            **(penalty or {}),
            num_train_epochs=max_epochs,
            per_device_train_batch_size=batch_size // micro_batches,
            gradient_accumulation_steps=micro_batches,
            style=encoder.style,
            max_length=encoder.max_length,
            max_new_tokens=max_new_tokens,
            seed=seed,
            save_strategy="no",
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
        )
        run = trainer(
            model,
            args,
            forget=forget,
            retain=retain,
            refusals=refusals,
            processing_class=encoder.tokenizer,
            forget_score=forget_score,
            callbacks=None if log is None else [HandOver(log)],
        )
        show(run, None)
        run.train()
        return run.progress()
