"""What is settled before the first step: what is refused, the threshold, what resuming needs, "initial" references."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from ssiuu_fast.evaluation.scores import default_threshold
from ssiuu_fast.loop.checkpoints import FROZEN_WEIGHTS
from ssiuu_fast.loop.rows import Rows, refuse_common_rows
from ssiuu_fast.loop.steps import Steps
from ssiuu_fast.objectives.log_probs import answer_log_probs
from ssiuu_fast.objectives.objective import Objective
from ssiuu_fast.ops.sequence_log_probs import answer_token_counts
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.sampling import rank_batches
from ssiuu_fast.trainer_config import UnlearningConfig
from ssiuu_fast.training import on_device

OPTIMIZATION = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip


def refuse_rows(
    objective: Objective, forget: Rows, retain: Rows | None, test: Rows | None, refusals: Sequence[str] | None
) -> None:
    """Raises ValueError for sets that the objective can't work with, and for rows in two of them."""
    if objective.needs_retain and retain is None:
        raise ValueError(f"{objective.name} needs retain rows and there are none: give retain, or use objective='ga'")
    if objective.needs_refusals and not refusals:
        raise ValueError(
            f"{objective.name} needs texts to refuse with: give refusals, a list such as data.refusals.load_refusals "
            "reads from a file"
        )
    if objective.needs_refusals and forget.examples is None:
        raise ValueError(f"{objective.name} answers the questions to forget with refusals: give forget rows as texts")
    for name, rows in (("retain", retain), ("test", test)):
        if rows is not None:
            refuse_common_rows(forget, rows, name)


def refuse_half_weights(model: nn.Module, args: UnlearningConfig) -> None:
    """Raises ValueError for trained float16 weights with target="probability"."""
    half = next((name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16), None)
    if args.regularize and args.target == "probability" and half is not None:
        raise ValueError(
            f"{half} is float16 with target='probability': gradients of probabilities under 6e-8 are flushed to 0. "
            "Load the model in float32 (fp16=True then computes in half precision) or bfloat16, or use "
            "target='log_probability' or 'mean_token_probability'"
        )


def refuse_missing_weights(model: nn.Module, ranks: Ranks) -> None:
    """Raises ValueError, on every rank, where a rank has parameters without values.

    accelerate gives the optimizer its sharded parameters by the addresses of those before: the same for all on the meta
    device, so that such a rank would train one parameter alone.
    """
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    empty = next((name for name in ranks.gather(empty) if name is not None), None)
    if empty is not None:
        raise ValueError(
            f"{empty} is on the meta device of some rank, without values: load the model whole on every rank, such as "
            "by from_pretrained, before the trainer is made"
        )


def threshold_of(args: UnlearningConfig, forget: Rows, forget_score: Callable | None) -> float | None:
    """The threshold that is given, or that of the forget texts; None where the run has no early stop.

    Raises ValueError for a threshold that nothing can be compared with.
    """
    if args.threshold is not None and forget_score is None and forget.examples is None:
        raise ValueError(
            f"threshold={args.threshold} with no evaluation set: tokenised forget rows can't be scored. Give texts "
            "with processing_class, or forget_score"
        )
    if args.threshold is not None or args.eval_strategy == IntervalStrategy.NO:
        return args.threshold
    if forget_score is not None or forget.examples is None:
        return None
    return default_threshold(forget.examples)


def run_settings(
    args: UnlearningConfig, steps: Steps, threshold: float | None, refusals: Sequence[str] | None, frozen_weights: str
) -> dict:
    """What a resumed run must share with the one it goes on with, as JSON gives it back.

    frozen_weights: their `frozen_fingerprint`.
    """
    penalty = {
        name: str(value) if isinstance(value, torch.dtype) else value
        for name, value in args.regularizer_options().items()
    }
    return {
        "objective": args.objective,
        "objective_options": args.objective_options,
        "penalty": penalty if args.regularize else None,
        "seed": args.rows_seed,
        "rows_per_step": steps.batch_size,
        "forget_rows": steps.forget.digest,
        "retain_rows": None if steps.retain is None else steps.retain.digest,
        "refusals": None if refusals is None else list(refusals),
        "threshold": threshold,
        FROZEN_WEIGHTS: frozen_weights,
        # a scheduler or an optimizer takes its settings from the checkpoint, whatever the new run was given
        "optimization": {name: _plain(getattr(args, name)) for name in OPTIMIZATION},
    }


def _plain(value):
    return getattr(value, "value", value)


def reference_batches(
    model: nn.Module, steps: Steps, batch_size: int, ranks: Ranks, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """reference="initial": log-probs, token counts and sample ids of this rank's part of a pass over the forget set.

    model: not under DistributedDataParallel, which has nothing to reduce in this pass.
    """
    for indices in rank_batches(len(steps.forget), batch_size, steps.seed, ranks.size, ranks.rank):
        batch = on_device(steps.collated([steps.forget.encoded[index] for index in indices]), device)
        yield answer_log_probs(model, batch), answer_token_counts(batch["labels"]), torch.tensor(indices)
