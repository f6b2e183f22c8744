"""The options of each command. Docstrings are what `--help` prints; a YAML file has the same names."""

from dataclasses import dataclass, field
from typing import Literal


def _require(options, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum:g}, got {value!r}")


def _require_above_zero(options, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")


@dataclass
class DemoOptions:
    """What the demo runs on.

    Args:
        data: people (invented people, minutes on two cores) or tofu (forget01 with 360 other pairs, up to an hour).
        tofu: folder or hub name of TOFU, for data=tofu.
        instructions: instruction data of the benign attack: exercises (embedded), or a file or hub name of Alpaca's
            form. Left open: exercises with people, tatsu-lab/alpaca with tofu.
        seeds: unlearning runs of each method; a seed has its own order of rows and its own attack sets.
        relative_weight: Ssiuu's penalty relative to the gradient at the start; 30 if left open.
        output: a new folder for everything that is written. Left open: runs/demo-<time>.
        resume: folder of a stopped demo to go on with; its own options are used, and all others here are ignored.
    """

    data: Literal["people", "tofu"] = "people"
    tofu: str = "locuslab/TOFU"
    instructions: str | None = None
    seeds: int = 3
    relative_weight: float | None = None
    output: str | None = None
    resume: str | None = None

    def __post_init__(self):
        _require(self, 1, "seeds")


@dataclass
class MemorizeOptions:
    """What is memorised, and by which model.

    Args:
        data: people, people:SPLIT, TOFU-FOLDER:SPLIT, locuslab/TOFU:SPLIT, faithun:FOLDER:SPLIT, or a JSONL file.
        output: a new folder; the model goes to its subfolder "model".
        model: folder or hub name of a model to fine-tune. Left open: a small Llama of the sizes below, with a tokenizer
            trained on the data.
        device: cpu, cuda, cuda:1, …; left open, a GPU where there is one.
        learning_rate: constant, AdamW.
        epochs: at most this many passes over the data.
        batch_size: rows a step.
        stop_at: stop as soon as the data's score reaches this; looked at every 5 epochs.
        hidden_size: width of the small Llama.
        layers: its blocks.
        heads: its attention heads.
        vocab_size: size of its tokenizer.
        max_length: longest row in tokens; longer ones are cut.
        seed: order of rows and initial weights.
    """

    data: str = "people"
    output: str | None = None
    model: str | None = None
    device: str | None = None
    learning_rate: float = 1e-3
    epochs: int = 60
    batch_size: int = 32
    stop_at: float = 0.97
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    vocab_size: int = 1024
    max_length: int = 512
    seed: int = 0

    def __post_init__(self):
        _require(self, 1, "epochs", "batch_size", "layers", "max_length")
        _require_above_zero(self, "learning_rate")


@dataclass
class UnlearnOptions:
    """What is unlearned, by which method, and when to stop.

    Args:
        model: folder or hub name of the model, or of adapters (PEFT) of one.
        forget: rows to forget: a JSONL file (question/answer, prompt/completion or messages), people:forget, or
            TOFU-FOLDER:forget01.
        retain: rows to keep, same forms. Without it only GA can run.
        test: rows to measure retention on (RS); left open, the retain rows.
        method: ssiuu (gd with the penalty), gd (gradient difference) or ga (gradient ascent). Left open: ssiuu, or ga
            where there are no retain rows.
        learning_rate: constant, AdamW. Take the lowest that reaches the threshold.
        threshold: stop when the forget score is at or under this. Left open: chance for rows with options, the mean
            ROUGE-L recall of mismatched pairs for the others.
        max_epochs: passes over the forget rows at most.
        batch_size: forget rows a step, and retain rows as many.
        micro_batch_size: rows at once, to save memory; the result is the same.
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
        device: cpu, cuda, cuda:1, …; left open, a GPU where there is one.
        seed: order of rows.
        output: a new folder; the model goes to its subfolder "model". Left open: runs/unlearn-<time>.
    """

    model: str
    forget: str
    retain: str | None = None
    test: str | None = None
    method: Literal["ssiuu", "gd", "ga"] | None = None
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
    output: str | None = None

    def __post_init__(self):
        _require(self, 1, "max_epochs", "batch_size", "micro_batch_size", "every", "max_length", "lora_rank")
        _require_above_zero(self, "learning_rate", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and under 1, got {self.lora_dropout!r}")
        if self.lora_rank is None and (
            self.lora_alpha is not None or self.lora_targets is not None or self.lora_dropout
        ):
            raise ValueError("lora_alpha, lora_targets and lora_dropout are of adapters: give lora_rank too")
        if self.weight is not None and self.relative_weight is not None:
            raise ValueError("give weight or relative_weight, not both")
        if self.granularity == "neuron" and self.state_dtype not in (None, "float32"):
            raise ValueError(
                f"state_dtype={self.state_dtype} is of no use with granularity=neuron, whose references are one fp32 "
                "number a neuron (and sample): leave state_dtype out"
            )
        split = self.micro_batch_size is not None and self.micro_batch_size < self.batch_size
        if self.granularity == "neuron" and self.reference == "previous" and split and self.method in (None, "ssiuu"):
            raise ValueError(
                "micro_batch_size: with granularity=neuron and reference=previous an attribution is a sum over the "
                "whole batch. Leave micro_batch_size out, or use reference=initial"
            )


@dataclass
class AttackOptions:
    """Which model is attacked, and how.

    Args:
        model: folder or hub name of the unlearned model. It is not changed. Adapters are merged into their model in
            memory: an attacker trains all of it.
        forget: the rows that it was to forget, in the forms that unlearn takes.
        harmful: fractions of the forget rows to retrain on; an empty list leaves the harmful attack out.
        instructions: instruction data of the benign attack: exercises (embedded), a file or hub name of Alpaca's form,
            or none to leave it out.
        only_wrong: harmful attack: leave out rows with options that are still answered rightly, as the paper does.
        taught_at: learning rate that taught the model; attacks take multiples of it. Left open: what memorize noted in
            the model's folder, else 1e-5.
        seeds: attacks of each kind, each with its own draw of rows.
        style: see unlearn.
        max_length: see unlearn.
        dtype: see unlearn.
        device: see unlearn.
        output: a new folder. Left open: runs/attack-<time>.
    """

    model: str
    forget: str
    harmful: list[float] = field(default_factory=lambda: [0.1, 0.3])
    instructions: str = "exercises"
    only_wrong: bool = True
    taught_at: float | None = None
    seeds: int = 3
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    output: str | None = None

    def __post_init__(self):
        _require(self, 1, "seeds", "max_length")
        _require_above_zero(self, "taught_at")


@dataclass
class EvaluateOptions:
    """Which model is scored on what.

    Args:
        model: folder or hub name of the model.
        data: rows to score, in the forms that unlearn takes.
        score: auto (rows with options by log-prob multiple choice, others by ROUGE-L recall), log_prob or generated
            (multiple choice in either form), rouge, probability, truth_ratio (rows with perturbed answers),
            extraction_strength, exact_memorisation; or, without data, tofu (its whole table) or harness (tasks of
            lm-evaluation-harness).
        tofu: folder or hub name of TOFU with its perturbed splits, for score=tofu.
        forget_split: what was to be forgotten, for score=tofu.
        retain_model: a model that never saw the forget split, for forget quality (or give retain_log).
        retain_log: results.json of score=tofu on such a model, or an OpenUnlearning log of it.
        tasks: names of the harness's tasks, with commas between them, for score=harness.
        items: how many of each task.
        style: see unlearn.
        max_length: see unlearn.
        dtype: weights in memory; auto is the checkpoint's.
        device: see unlearn.
        output: a new folder. Left open: runs/evaluate-<time>.
    """

    model: str
    data: str | None = None
    score: Literal[
        "auto",
        "log_prob",
        "generated",
        "rouge",
        "probability",
        "truth_ratio",
        "extraction_strength",
        "exact_memorisation",
        "tofu",
        "harness",
    ] = "auto"
    tofu: str = "locuslab/TOFU"
    forget_split: Literal["forget01", "forget05", "forget10"] = "forget01"
    retain_model: str | None = None
    retain_log: str | None = None
    tasks: str = "mmlu,gsm8k,hellaswag,arc_challenge,winogrande"
    items: int = 500
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    output: str | None = None

    def __post_init__(self):
        _require(self, 1, "max_length", "items")
        if (self.data is None) != (self.score in ("tofu", "harness")):
            other = "has its own data: leave data out" if self.data is not None else "needs data: the rows to score"
            raise ValueError(f"score={self.score} {other}")
        if self.score != "tofu" and (self.retain_model or self.retain_log):
            raise ValueError(f"a retain model is what score=tofu compares with, not score={self.score}")
        if self.retain_model and self.retain_log:
            raise ValueError("give retain_model or retain_log, not both: each is one model's truth ratios")


@dataclass
class InfluenceOptions:
    """Which unlearning is looked at, whatever method or framework did it.

    Args:
        before: folder or hub name of the model before unlearning.
        after: of the model after it.
        attacked: of the model after an attack on it, to see whether the attack brings the old neurons back.
        data: the rows that were to be forgotten, in the forms that unlearn's forget takes. A row is told from its wrong
            options, or, without any, from another row's answer.
        distractors: rows whose answers are the wrong ones for rows without options, same forms. Left open: those of
            data.
        positions: the tokens whose attributions count: all, prompt, answer, or no_bos for all but the first.
        batch_size: sequences at once: rows, or the options of rows where accuracy is taken.
        style: see unlearn.
        max_length: see unlearn.
        dtype: weights in memory; auto is the checkpoint's.
        device: see unlearn.
        output: a new folder for the page, its pictures with their numbers, and the attributions. Left open:
            runs/influence-<time>.
    """

    before: str
    after: str
    data: str
    attacked: str | None = None
    distractors: str | None = None
    positions: Literal["all", "prompt", "answer", "no_bos"] = "all"
    batch_size: int = 8
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    output: str | None = None

    def __post_init__(self):
        _require(self, 1, "batch_size", "max_length")


@dataclass
class CompareOptions:
    """Which methods are compared, on which model and rows.

    Args:
        methods: ga, gd and every other objective by its name, each with +ssiuu for the penalty on top; ssiuu is
            gd+ssiuu. With commas between.
        data: people (invented people) or tofu (forget01 with 360 other pairs). Left open: people, or your own rows
            where forget is given.
        tofu: folder or hub name of TOFU, for data=tofu.
        model: folder or hub name of the model. With data it must have been taught that data (an earlier run's folder
            "memorised"); left open, a small one is taught first.
        forget: your own rows to forget, in the forms that unlearn takes.
        retain: rows to keep, same forms.
        test: rows to measure retention on (RS); left open, the retain rows.
        utility: rows that have nothing to do with the forget rows, for a score of their own (US); one source or a list.
        instructions: instruction data of the benign attack: exercises (embedded), or a file or hub name of Alpaca's
            form. Left open: tatsu-lab/alpaca with tofu, else exercises.
        threshold: stop unlearning when the forget score is at or under this. Left open: the data's (see unlearn).
        seeds: runs of each method at its learning rate; a seed has its own order of rows and its own attack sets.
        learning_rates: those that are tried, from the lowest up to the first that reaches the threshold. Left open:
            {1, 2, 5}·10^k from a thousandth of taught_at to ten times it.
        max_epochs: passes over the forget rows at most.
        penalised_max_epochs: the same, for a method with the penalty at the learning rate found for its backbone.
        objective_options: options of objectives by name, for example {npo: {beta: 0.5}}.
        relative_weight: the penalty relative to the gradient at the start.
        batch_size: forget rows a step, and retain rows as many.
        micro_batch_size: rows at once, to save memory; the result is the same.
        taught_at: learning rate that taught the model; attacks take multiples of it. Left open: what memorize noted in
            the model's folder, else the data's own, else 1e-5.
        style: see unlearn.
        max_length: longest row in tokens; longer ones are cut. Left open: 512, or the data's own.
        dtype: see unlearn.
        device: cpu, cuda, cuda:1, …; left open, a GPU where there is one. Several GPUs each do a run at a time.
        output: a new folder. Left open: runs/compare-<time>.
        resume: folder of a stopped comparison to go on with; its own options are used, and all others are ignored.
    """

    methods: list[str] | str = "ga,gd,dpo,npo,rmu,klue,ssiuu"
    data: Literal["people", "tofu"] | None = None
    tofu: str = "locuslab/TOFU"
    model: str | None = None
    forget: str | None = None
    retain: str | None = None
    test: str | None = None
    utility: list[str] | str | None = None
    instructions: str | None = None
    threshold: float | None = None
    seeds: int = 3
    learning_rates: list[float] | None = None
    max_epochs: int = 20
    penalised_max_epochs: int = 100
    objective_options: dict[str, dict] | None = None
    relative_weight: float = 30.0
    batch_size: int = 16
    micro_batch_size: int | None = None
    taught_at: float | None = None
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    output: str | None = None
    resume: str | None = None

    def __post_init__(self):
        if isinstance(self.methods, str):
            self.methods = [name.strip() for name in self.methods.split(",") if name.strip()]
        if not self.methods:
            raise ValueError("methods is empty: name those to compare, for example ga,gd,ssiuu")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods names one twice: {', '.join(self.methods)}")
        _require(self, 1, "seeds", "max_epochs", "penalised_max_epochs", "batch_size", "micro_batch_size", "max_length")
        _require_above_zero(self, "taught_at", "relative_weight")
        if self.learning_rates is not None:
            for rate in self.learning_rates:
                if not 0 < rate < float("inf"):
                    raise ValueError(f"learning_rates must be numbers above 0, got {rate!r}")
            self.learning_rates = sorted(set(self.learning_rates))
            if not self.learning_rates:
                raise ValueError("learning_rates is empty: leave it out for the usual ones")
        if self.forget is None and (self.retain or self.test):
            raise ValueError("retain and test are of use with forget: your own rows come together")
        if self.forget is not None:
            if self.data is not None:
                raise ValueError(f"give data={self.data} or your own rows (forget), not both")
            if self.model is None:
                raise ValueError("your own rows (forget) need the model that knows them: give model")
            if self.retain is None:
                raise ValueError("give retain: rows that the model is to keep, which most methods train on")


@dataclass
class PlanOptions:
    """What is to run, and on what. Nothing runs: of a model only config.json is read.

    Args:
        model: folder or hub name. Left open: a Llama of the sizes below.
        hidden_size: width of the Llama.
        layers: its blocks.
        heads: its attention heads.
        kv_heads: heads of its keys and values; left open, as many as heads.
        intermediate_size: width of its MLP; left open, about 8/3 of hidden_size.
        vocab_size: size of its vocabulary.
        batch_size: forget rows a step, and retain rows as many.
        micro_batch_size: rows at once; left open, all of them.
        length: tokens of a row, padding included.
        dtype: weights in memory.
        state_dtype: what the penalty's references are stored in; left open, the dtype of the weights.
        granularity: what the penalty is on, see unlearn.
        gradient_checkpointing: activations of blocks are computed again in every backward pass instead of kept.
        rows: forget rows; with it the plan also tells the time of an epoch.
        gpus: 1 to 8, which share the rows of a step. Several processes are not built yet.
        device: A100-80, H100, H200, B200, RTX-4090, RTX-5090, or cpu, whose speed is then measured for a second. Left
            open: all of those GPUs.
        memory: of a device that isn't listed, in GB of 10^9 bytes; give bandwidth and tflops with it.
        bandwidth: of its memory, in GB/s.
        tflops: of its matrix products in `dtype`.
    """

    model: str | None = None
    hidden_size: int = 3072
    layers: int = 28
    heads: int = 24
    kv_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int = 128256
    batch_size: int = 16
    micro_batch_size: int | None = None
    length: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    state_dtype: Literal["float32", "bfloat16", "8bit"] | None = None
    granularity: Literal["parameter", "neuron"] = "parameter"
    gradient_checkpointing: bool = False
    rows: int | None = None
    gpus: int = 1
    device: str | None = None
    memory: float | None = None
    bandwidth: float | None = None
    tflops: float | None = None

    def __post_init__(self):
        _require(self, 1, "hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "vocab_size")
        _require(self, 1, "batch_size", "micro_batch_size", "rows", "gpus")
        _require(self, 2, "length")
        _require_above_zero(self, "memory", "bandwidth", "tflops")
        if self.gpus > 8:
            raise ValueError(f"gpus must be at most 8, got {self.gpus}")
        if self.batch_size % self.gpus:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of gpus={self.gpus}, which share the rows"
            )
        limits = [self.memory, self.bandwidth, self.tflops]
        if any(limit is not None for limit in limits) and (None in limits or self.device is not None):
            raise ValueError(
                "of a device that isn't listed give memory, bandwidth and tflops, all three, and no device"
            )
        if self.granularity == "neuron" and self.state_dtype not in (None, "float32"):
            raise ValueError("state_dtype: neurons have small references in float32, leave it out")
