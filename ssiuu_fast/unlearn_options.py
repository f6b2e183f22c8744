"""The options of `unlearn`. Docstrings are what `--help` prints; a YAML file has the same names."""

from dataclasses import dataclass
from typing import Any, Literal

from ssiuu_fast.methods import PENALTY
from ssiuu_fast.methods import method as method_named
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.option_checks import require, require_above_zero


@dataclass
class UnlearnOptions:
    """What is unlearned, by which method, and when to stop.

    Args:
        model: folder or hub name of the model, or of adapters (PEFT) of one.
        forget: rows to forget: a JSONL file (question/answer, prompt/completion or messages), people:forget,
            TOFU-FOLDER:forget01 or faithun:FOLDER:forget.
        retain: rows to keep, same forms. Without it only GA can run.
        test: rows to measure retention on (RS); left open, the retain rows.
        method: ga, gd (gradient difference), dpo, npo, simnpo, rmu or klue, each with +ssiuu for the penalty on top;
            ssiuu is gd+ssiuu. Left open: ssiuu, or ga where there are no retain rows.
        objective_options: options of the method's objective by name, for example {beta: 0.5} for npo.
        refusals: text file for dpo, a refusal a line, which it prefers to the answers. Left open: "I can't answer the
            question."
        reference_cache: folder where the log-probs of the starting model, which dpo and npo need, are kept for runs to
            come. Left open: they are computed anew.
        learning_rate: constant, AdamW. Take the lowest that reaches the threshold.
        threshold: stop when the forget score is at or under this. Left open: chance for rows with options, the mean
            ROUGE-L recall of mismatched pairs for the others.
        max_epochs: passes over the forget rows at most.
        batch_size: forget rows a step, over all processes, and retain rows as many.
        micro_batch_size: rows at once in a process, to save memory; the result is the same.
        weight: λ of the penalty, literally. Carries over from no other model.
        relative_weight: penalty relative to the gradient at the start; 30 if neither this nor weight is given.
        target: what the attribution is of: probability (the paper), log_probability or mean_token_probability (for
            long answers, whose probability underflows).
        granularity: what has an attribution: each parameter (the paper), or each neuron, an output of a linear module.
            Of adapters the parameters are those of A and B, the neurons those of the whole adapted module.
        reference: what attributions are compared with: previous step or initial weights.
        one_sided: penalise only attributions below their reference.
        every: penalise each k-th step only, k times as much.
        state_dtype: what the penalty's references are stored in; 8bit is a quarter of float32. Left open: the dtype of
            the weights.
        offload: keep the penalty's references in host memory, and bring them to the GPU as they are needed. Not with
            several processes that share the model (FSDP2).
        lora_rank: train adapters of this rank (LoRA) instead of the model, and save the adapters alone. They take
            higher learning rates. Left open: the model is trained, or its adapters where it has some.
        lora_alpha: adapters are scaled by alpha / rank; left open, twice the rank.
        lora_targets: linear modules that get adapters, by name as q_proj; left open, all inside the blocks.
        lora_dropout: on the input of adapters while training.
        load_in_4bit: the frozen model under the adapters in 4 bits (QLoRA); needs bitsandbytes. The run's scores are of
            that model; other commands put the adapters on the model as it is on disk.
        gradient_checkpointing: compute the activations of blocks again in every backward pass instead of keeping them.
        style: how questions are put: chat template, plain "Question: … Answer:", or whichever the tokenizer has.
        max_length: longest row in tokens; longer ones are cut.
        dtype: weights in memory, whatever the checkpoint's. bfloat16 halves them, and loses updates smaller than 1/256
            of a weight: at the learning rates of unlearning most of them. Adapters stay in float32.
        device: cpu or cuda; left open, a GPU where there is one. Choose among several by CUDA_VISIBLE_DEVICES.
        seed: order of rows.
        save_every: epochs after which the state of the run is saved, to be resumed from; the last one is kept until the
            run is finished. It takes a few times the room of the model. 0: never.
        output: a new folder; the model goes to its subfolder "model". Left open: runs/unlearn-<time>.
        resume: folder of a stopped run to go on with; its own options are used, and all others here are ignored.
    """

    model: str | None = None
    forget: str | None = None
    retain: str | None = None
    test: str | None = None
    method: str | None = None
    objective_options: dict[str, Any] | None = None
    refusals: str | None = None
    reference_cache: str | None = None
    learning_rate: float = 1e-5
    threshold: float | None = None
    max_epochs: int = 20
    batch_size: int = 16
    micro_batch_size: int | None = None
    weight: float | None = None
    relative_weight: float | None = None
    target: Literal["probability", "log_probability", "mean_token_probability"] = "probability"
    granularity: Literal["parameter", "neuron"] = "parameter"
    reference: Literal["previous", "initial"] = "previous"
    one_sided: bool = False
    every: int = 1
    state_dtype: Literal["float32", "bfloat16", "8bit"] | None = None
    offload: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: list[str] | None = None
    lora_dropout: float = 0.0
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    seed: int = 0
    save_every: int = 1
    output: str | None = None
    resume: str | None = None

    def __post_init__(self):
        if self.resume is not None:
            return
        if self.model is None or self.forget is None:
            raise ValueError(
                "give model and forget: what is to unlearn, and what. Or resume: the folder of a stopped run"
            )
        require(self, 1, "max_epochs", "batch_size", "micro_batch_size", "every", "max_length", "lora_rank")
        require(self, 0, "save_every")
        require_above_zero(self, "learning_rate", "lora_alpha")
        self._refuse_method()
        self._refuse_adapters()
        if self.weight is not None and self.relative_weight is not None:
            raise ValueError("give weight or relative_weight, not both")
        if self.granularity == "neuron" and self.state_dtype not in (None, "float32"):
            raise ValueError(
                f"state_dtype={self.state_dtype} is of no use with granularity=neuron, whose references are one fp32 "
                "number a neuron (and sample): leave state_dtype out"
            )
        if self.offload and self.device == "cpu":
            raise ValueError("offload: on the CPU the references are in host memory anyway, leave it out")
        if self.granularity == "neuron" and self.offload:
            raise ValueError(
                "offload is of no use with granularity=neuron, whose references are one number a neuron (and sample): "
                "leave offload out"
            )

    def _refuse_method(self) -> None:
        if self.method is None:
            if self.objective_options or self.refusals:
                raise ValueError("objective_options and refusals are of a method: give method too")
            return
        named = method_named(self.method)
        objective = make_objective(named.objective, **(self.objective_options or {}))
        if self.refusals is not None and not objective.needs_refusals:
            raise ValueError(f"refusals: method {self.method} has no use for any, only dpo has")
        if not named.penalised and (self.weight is not None or self.relative_weight is not None):
            raise ValueError(
                f"weight and relative_weight are of the penalty, which {self.method} goes without: use "
                f"{self.method}+{PENALTY}, or leave them out"
            )

    def _refuse_adapters(self) -> None:
        if self.lora_rank is None and (
            self.lora_alpha is not None or self.lora_targets is not None or self.lora_dropout
        ):
            raise ValueError("lora_alpha, lora_targets and lora_dropout are of adapters: give lora_rank too")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and under 1, got {self.lora_dropout!r}")
