"""How an unlearning run is configured: TrainingArguments, the objective, the penalty and the early stop."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ssiuu_fast.data.collate import STYLES
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.objective import Objective
from ssiuu_fast.references import EIGHT_BIT, STATE_DTYPES, state_dtype_name
from ssiuu_fast.regularizer import STARTING_RELATIVE_WEIGHT
from ssiuu_fast.regularizer_options import REFERENCES
from ssiuu_fast.targets import TARGETS

GRANULARITIES = ("parameter", "neuron")
STATE_DTYPE_NAMES = tuple(state_dtype_name(dtype) for dtype in STATE_DTYPES)
_STEPS_IN_BACKWARD = ("lomo", "adalomo")
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


@dataclass
class UnlearningConfig(TrainingArguments):
    """TrainingArguments with what unlearning adds; the defaults are METHOD's (open point 8).

    A step takes per_device_train_batch_size × gradient_accumulation_steps × ranks forget rows and as many retain rows.

    Args:
        objective: ga, gd, dpo, npo, simnpo, rmu or klue.
        objective_options: options of the objective by name, such as {"beta": 0.1}.
        regularize: add the Ssiuu penalty.
        weight: λ of the penalty, literally. Carries over from no other model.
        relative_weight: penalty relative to the gradient at the start; 30 if neither this nor weight is given. Neurons
            under FSDP2 need weight in its place.
        target: probability, log_probability or mean_token_probability, of which attributions are taken.
        granularity: parameter or neuron.
        reference: previous step or initial weights, which attributions are compared with.
        one_sided: penalise only attributions below their reference.
        every: penalise each k-th step only, k times as much.
        state_dtype: what the references are stored in: float32, bfloat16 or 8bit. Left open: the weights' dtype.
        offload: keep the references in host memory.
        regularized_parameters: glob patterns over parameter names. Left open: the linear modules inside the blocks.
        threshold: stop when the forget score is at or under this. Left open: the score of a model that doesn't know the
            forget rows (evaluation.scores.default_threshold). No early stop where the rows have no texts, nor where the
            trainer is given a forget_score, of whose numbers nothing is known: every epoch is then run, and the model
            ends with the weights of the last step.
        style: how questions are put: chat, plain, or auto for whichever the tokenizer has.
        max_length: longest row in tokens; longer ones are cut.
        max_new_tokens: longest answer that scoring generates.
        reference_cache: folder for the log-probs of the starting model that DPO and NPO need. Left open: not kept.

    Raises ValueError for whatever can't work, before anything is loaded or changed.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "objective_options"]

    objective: str = field(default="gd", metadata={"help": "Unlearning objective by name."})
    objective_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Its options, a JSON dict."})
    regularize: bool = field(default=True, metadata={"help": "Add the Ssiuu penalty."})
    weight: float | None = field(default=None, metadata={"help": "λ of the penalty, literally."})
    relative_weight: float | None = field(default=None, metadata={"help": "λ relative to the gradient at the start."})
    target: str = field(default="probability", metadata={"help": f"One of {', '.join(TARGETS)}."})
    granularity: str = field(default="parameter", metadata={"help": "parameter or neuron."})
    reference: str = field(default="previous", metadata={"help": "previous (step) or initial (weights)."})
    one_sided: bool = field(default=False, metadata={"help": "Penalise only attributions below their reference."})
    every: int = field(default=1, metadata={"help": "Penalise each k-th step only."})
    state_dtype: str | None = field(default=None, metadata={"help": "Of the references: float32, bfloat16 or 8bit."})
    offload: bool = field(default=False, metadata={"help": "Keep the references in host memory."})
    regularized_parameters: list[str] | None = field(default=None, metadata={"help": "Glob patterns over names."})
    threshold: float | None = field(default=None, metadata={"help": "Forget score at which unlearning stops."})
    style: str = field(default="auto", metadata={"help": "auto, chat or plain."})
    max_length: int = field(default=512, metadata={"help": "Longest row in tokens."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest answer that scoring generates."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder for reference log-probs."})

    learning_rate: float = field(default=1e-5, metadata={"help": "Take the lowest that reaches the threshold."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate scheduler."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Forget rows at once on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sequences at once in scoring."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the forget rows at most."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When the forget score is taken."})
    eval_on_start: bool = field(default=True, metadata={"help": "Take the forget score before the first step."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})

    def __post_init__(self):
        # before TrainingArguments imports its engine
        refuse_deepspeed(self.deepspeed)
        # before it asks for a metric on behalf of them
        _refuse_schedule(self.lr_scheduler_type)
        super().__post_init__()
        self.objective_options = self.objective_options or {}
        self._refuse_options()
        self._refuse_arguments()
        if self.regularize:
            self._refuse_with_the_penalty()
        self._force_settings()

    def new_objective(self) -> Objective:
        """Raises ValueError for an unknown name or option."""
        return make_objective(self.objective, **self.objective_options)

    def regularizer_options(self) -> dict:
        """Arguments of SSIUURegularizer, beside the model."""
        relative = self.relative_weight
        if self.weight is None and relative is None:
            relative = STARTING_RELATIVE_WEIGHT
        return {
            "weight": self.weight or 0.0,
            "relative_weight": relative,
            "target": self.target,
            "granularity": self.granularity,
            "reference": self.reference,
            "one_sided": self.one_sided,
            "every": self.every,
            "state_dtype": self.state_dtype
            if self.state_dtype in (None, EIGHT_BIT)
            else getattr(torch, self.state_dtype),
            "offload": self.offload,
            "parameters": self.regularized_parameters,
        }

    @property
    def rows_seed(self) -> int:
        """What the rows of the steps are drawn from."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def checkpointing_options(self) -> dict | None:
        """Of gradient checkpointing, which newer transformers call activation checkpointing; None if it is off."""
        prefix = "activation" if hasattr(self, "activation_checkpointing") else "gradient"
        if not getattr(self, f"{prefix}_checkpointing"):
            return None
        return getattr(self, f"{prefix}_checkpointing_kwargs") or {}

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 spreads the model over the ranks, as asked for here or by `accelerate launch`."""
        return bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")

    def _refuse_options(self) -> None:
        for name, value, allowed in (
            ("target", self.target, TARGETS),
            ("granularity", self.granularity, GRANULARITIES),
            ("reference", self.reference, REFERENCES),
            ("state_dtype", self.state_dtype, STATE_DTYPE_NAMES),
            ("style", self.style, STYLES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
        self.new_objective().refuse(self)
        if self.weight is not None and self.relative_weight is not None:
            raise ValueError(
                f"weight={self.weight} and relative_weight={self.relative_weight}: give one of them, λ or its relation "
                "to the gradient"
            )
        for name, least in (("max_length", 2), ("max_new_tokens", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("weight", "relative_weight", "threshold"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")

    def _refuse_arguments(self) -> None:
        if self.load_best_model_at_end or self.metric_for_best_model or self.save_strategy == SaveStrategy.BEST:
            raise ValueError(
                "load_best_model_at_end, metric_for_best_model and save_strategy='best': leave them out, an unlearning "
                "run that doesn't reach its threshold ends with the weights of its lowest forget score anyway"
            )
        if self.threshold is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"threshold={self.threshold} with eval_strategy='no': nothing would ever be compared with it. Use "
                "eval_strategy='epoch', or 'steps' with eval_steps"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the rows of a step, and attributions are sums over them: lower "
                "per_device_train_batch_size and raise gradient_accumulation_steps by the same factor"
            )
        optimizer = self.optim.value
        if optimizer in _STEPS_IN_BACKWARD or optimizer.endswith("_layerwise"):
            raise ValueError(
                f"optim={optimizer!r} steps inside the backward pass, and would move the weights before the step's "
                "gradient is whole: use another optimizer, such as adamw_torch or adamw_bnb_8bit"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: no objective has one, leave it out"
            )
        if self.ignore_data_skip:
            raise ValueError("ignore_data_skip: the rows of a step follow from its number, so there is nothing to skip")
        if self.parallelism_config is not None:
            raise ValueError(
                "parallelism_config: tensor, context and sequence parallelism are not supported, use FSDP2"
            )
        if (self.checkpointing_options or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True: reentrant checkpointing can't give the gradient of the target. Leave it out, the "
                "other kind is exact"
            )

    def _refuse_with_the_penalty(self) -> None:
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True: its kernels overwrite saved tensors in place, and the second backward pass, "
                "which the penalty needs, would be silently wrong. Leave it out, or set regularize=False"
            )
        if self.fsdp and ((self.fsdp_plugin_args or {}).get("fsdp_version") != 2):
            raise ValueError(
                "fsdp_config with version 1 or XLA: flat parameters can't be regularised one by one, use FSDP2 "
                "(version 2)"
            )
        if self.fsdp and self._accumulation_options().get("sync_each_batch") is False:
            raise ValueError(
                "sync_each_batch=False under FSDP2: without gradient sync in every micro-batch the target's gradient "
                "and the loss's come back as one sum. Leave it out"
            )
        if self.sharded and self.offload:
            raise ValueError(
                "offload=True under FSDP2: it keeps whole references in host memory, and those are sharded like the "
                "model. Leave it out"
            )
        if self.granularity == "neuron":
            self._refuse_with_neurons()

    def _refuse_with_neurons(self) -> None:
        if self.sharded and self.weight is None:
            raise ValueError(
                "granularity='neuron' under FSDP2 without weight: relative_weight would have to measure what the "
                "penalty comes to at sharded parameters, which can't be had on its own. Give weight, as a run on one "
                "GPU or under DDP found it (progress().weight)"
            )
        if self.state_dtype not in (None, "float32"):
            raise ValueError(
                f"state_dtype={self.state_dtype!r} is of no use with granularity='neuron', whose references are one "
                "fp32 number a neuron (and sample): leave it out"
            )
        if self.offload:
            raise ValueError(
                "offload=True is of no use with granularity='neuron', whose references are one number a neuron (and "
                "sample): leave it out"
            )
        if self.torch_compile:
            raise ValueError(
                "torch_compile with granularity='neuron': taps are forward hooks, which a compiled graph leaves out. "
                "Use granularity='parameter', or leave torch_compile out"
            )
        if self.reference == "previous" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} with granularity='neuron' and "
                "reference='previous', whose attributions are sums over the whole batch: use 1, or reference='initial'"
            )

    def _accumulation_options(self) -> dict:
        return self.accelerator_config.gradient_accumulation_kwargs or {}

    def _force_settings(self) -> None:
        options = self.checkpointing_options
        if options is not None:
            for prefix in ("activation", "gradient"):
                if hasattr(self, f"{prefix}_checkpointing"):
                    setattr(self, f"{prefix}_checkpointing_kwargs", options | {"use_reentrant": False})
        if self.sharded and self.regularize and self.gradient_accumulation_steps > 1:
            self.accelerator_config.gradient_accumulation_kwargs = {
                **self._accumulation_options(),
                "sync_each_batch": True,
            }
        if self.n_gpu > 1:
            # DataParallel's replicas hide the parameters from autograd: one GPU, or one process each
            self._n_gpu = 1


def _refuse_schedule(name: str) -> None:
    name = getattr(name, "value", name)
    if name in _BY_METRIC:
        raise ValueError(
            f"lr_scheduler_type={name!r} changes the learning rate by a metric of the evaluations, and so by how often "
            "the forget score is taken: use 'constant', or a schedule over steps such as 'linear' or 'cosine'"
        )


def refuse_deepspeed(config=None) -> None:
    """Raises ValueError for a DeepSpeed config, or where a launcher asks for DeepSpeed."""
    if config or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes"):
        raise ValueError(
            "DeepSpeed is not supported: its engine owns the backward pass, and the gradient of the target can't "
            "be had beside the loss's. Use DDP, or FSDP2 (fsdp=True) where the model must be sharded"
        )
