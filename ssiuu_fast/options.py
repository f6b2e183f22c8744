"""The options of the commands for one model. Docstrings are what `--help` prints; a YAML file has the same names."""

from dataclasses import dataclass, field
from typing import Literal

from ssiuu_fast.option_checks import require, require_above_zero


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
        require(self, 1, "epochs", "batch_size", "layers", "max_length")
        require_above_zero(self, "learning_rate")


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
        require(self, 1, "seeds", "max_length")
        require_above_zero(self, "taught_at")


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
        require(self, 1, "max_length", "items")
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
        require(self, 1, "batch_size", "max_length")
