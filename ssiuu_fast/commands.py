"""The commands of `ssiuu-fast`: a dataclass of options and a function each. cli.py reads the flags, this does the work."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ssiuu_fast import models
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example, refuse_overlap
from ssiuu_fast.data.sources import load_examples, load_instructions
from ssiuu_fast.demo import run_demo
from ssiuu_fast.evaluation import scores
from ssiuu_fast.evaluation.attacks import Attack, benign_attack, harmful_attack
from ssiuu_fast.experiment import PEOPLE, TOFU, Recipe, Task, people_task, teach, tofu_task
from ssiuu_fast.regularizer import SSIUURegularizer
from ssiuu_fast.report.text import mean_sd, table
from ssiuu_fast.runs import RunFolder
from ssiuu_fast.unlearning import unlearn

# the learning rate at which the paper's models were taught TOFU; attacks take multiples of it
PUBLISHED_TEACHING_RATE = 1e-5
# METHOD, open point 5: where to start
DEFAULT_RELATIVE_WEIGHT = 30.0
TEACHING_FILE = "teaching.json"
MODEL_FOLDER = "model"


@dataclass
class DemoOptions:
    """What the demo runs on.

    Args:
        data: people (invented people, minutes on two cores) or tofu (forget01 with 360 other pairs, up to an hour).
        tofu: folder or hub name of TOFU, for data=tofu.
        instructions: instruction data of the benign attack: exercises (embedded), or a file or hub name of Alpaca's
            form. Left open: exercises with people, tatsu-lab/alpaca with tofu.
        seeds: unlearning runs of each method; a seed has its own order of rows and its own attack sets.
        relative_weight: Ssiuu's penalty relative to the gradient at the start.
        output: a new folder for everything that is written. Left open: runs/demo-<time>.
        resume: folder of a stopped demo to go on with; its own options are used, and all others here are ignored.
    """

    data: Literal["people", "tofu"] = "people"
    tofu: str = "locuslab/TOFU"
    instructions: str | None = None
    seeds: int = 3
    relative_weight: float = DEFAULT_RELATIVE_WEIGHT
    output: str | None = None
    resume: str | None = None


@dataclass
class MemorizeOptions:
    """What is memorised, and by which model.

    Args:
        data: people, people:SPLIT, TOFU-FOLDER:SPLIT, locuslab/TOFU:SPLIT, or a JSONL file.
        output: a new folder; the model goes to its subfolder "model".
        model: folder or hub name of a model to fine-tune. Left open: a small Llama of the sizes below, with a tokenizer
            trained on the data.
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


@dataclass
class UnlearnOptions:
    """What is unlearned, by which method, and when to stop.

    Args:
        model: folder or hub name of the model.
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
        reference: what attributions are compared with: previous step or initial weights.
        one_sided: penalise only attributions below their reference.
        every: penalise each k-th step only, k times as much.
        style: how questions are put: chat template, plain "Question: … Answer:", or whichever the tokenizer has.
        max_length: longest row in tokens; longer ones are cut.
        dtype: weights in memory; auto is the checkpoint's.
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
    reference: Literal["previous", "initial"] = "previous"
    one_sided: bool = False
    every: int = 1
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    seed: int = 0
    output: str | None = None


@dataclass
class AttackOptions:
    """Which model is attacked, and how.

    Args:
        model: folder or hub name of the unlearned model. It is not changed.
        forget: the rows that it was to forget, in the forms that unlearn takes.
        harmful: fractions of the forget rows to retrain on; an empty list leaves the harmful attack out.
        instructions: instruction data of the benign attack: exercises (embedded), a file or hub name of Alpaca's form,
            or none to leave it out.
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
    taught_at: float | None = None
    seeds: int = 3
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    output: str | None = None


@dataclass
class EvaluateOptions:
    """Which model is scored on what.

    Args:
        model: folder or hub name of the model.
        data: rows to score, in the forms that unlearn takes.
        score: auto (rows with options by log-prob multiple choice, others by ROUGE-L recall), log_prob or generated
            (multiple choice in either form), or rouge.
        style: see unlearn.
        max_length: see unlearn.
        dtype: see unlearn.
        device: see unlearn.
        output: a new folder. Left open: runs/evaluate-<time>.
    """

    model: str
    data: str
    score: Literal["auto", "log_prob", "generated", "rouge"] = "auto"
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    output: str | None = None


def demo(options: DemoOptions) -> None:
    """Unlearn people by GD and by Ssiuu, attack both by retraining, and read which one erased."""
    if options.resume is not None:
        run = RunFolder(Path(options.resume))
        options = DemoOptions(**run.read_json("config.json")["options"])
        print(f"going on in {run.path} with the options it was started with")
    else:
        run = RunFolder.create(options.output, "demo", asdict(options))
    task, recipe = _demo_setting(options)
    run_demo(task, replace(recipe, relative_weight=options.relative_weight), options.seeds, run)


def memorize(options: MemorizeOptions) -> None:
    """Train a model to know a data set, so that there is something to unlearn."""
    rows = load_examples(options.data)
    if options.model is None:
        tokenizer = models.train_tokenizer(
            [text for row in rows for text in (row.prompt, row.answer)], options.vocab_size
        )
        model = models.new_llama(
            tokenizer,
            options.hidden_size,
            options.layers,
            options.heads,
            max_positions=options.max_length,
            seed=options.seed,
        )
    else:
        model, tokenizer = models.load(options.model)
    run = RunFolder.create(options.output, "memorize", asdict(options))
    taught = teach(
        model.to(_device(None)),
        Encoder(tokenizer, max_length=options.max_length),
        rows,
        rows,
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        known_at=options.stop_at,
        seed=options.seed,
        progress=True,
    )
    models.save(model, tokenizer, run.file(MODEL_FOLDER))
    run.write_json(f"{MODEL_FOLDER}/{TEACHING_FILE}", taught)
    run.write_json("results.json", taught)
    print(table(["memorised", "score", "epochs"], [[options.data, f"{taught['score']:.3f}", str(taught["epochs"])]]))
    if taught["score"] < options.stop_at:
        print(
            f"the score {options.stop_at:g} was not reached in {options.epochs} epochs: raise epochs, or the model's size"
        )
    print(f"model: {run.file(MODEL_FOLDER)}")


def unlearn_command(options: UnlearnOptions) -> None:
    """Unlearn rows of your own from a model, with an early stop at the forget threshold."""
    if options.weight is not None and options.relative_weight is not None:
        raise ValueError("give weight or relative_weight, not both")
    forget = load_examples(options.forget)
    retain = load_examples(options.retain) if options.retain else None
    test = load_examples(options.test) if options.test else retain
    method = _method(options.method, retain)
    if retain is not None:
        refuse_overlap(forget, retain, options.forget, options.retain)
    if options.test:
        refuse_overlap(forget, test, options.forget, options.test)
    threshold = options.threshold
    if threshold is None:
        threshold = scores.default_threshold(forget)
        print(f"threshold: {threshold:.4f}, the score of a model that has these rows mixed up or guesses")
    model, encoder = _load(options)
    regularizer = None
    if method == "ssiuu":
        regularizer = _regularizer(model, options)
    run = RunFolder.create(options.output, "unlearn", asdict(options) | {"method": method, "threshold": threshold})
    before = _both_scores(model, encoder, forget, test)
    progress = unlearn(
        model,
        [encoder.encode(row) for row in forget],
        [encoder.encode(row) for row in retain] if retain and method != "ga" else None,
        objective="gd" if method == "ssiuu" else method,
        learning_rate=options.learning_rate,
        threshold=threshold,
        forget_score=lambda: scores.score(model, encoder, forget).mean,
        regularizer=regularizer,
        max_epochs=options.max_epochs,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        seed=options.seed,
        log=lambda row: run.log("steps.jsonl", row),
        description=method,
    )
    after = _both_scores(model, encoder, forget, test)
    models.save(model, encoder.tokenizer, run.file(MODEL_FOLDER))
    _carry_teaching(options.model, run)
    run.write_json("results.json", {"before": before, "after": after, "unlearning": progress.as_dict()})
    print(table(["", "FS", "RS"], [[name, *map(_number, row)] for name, row in (("before", before), (method, after))]))
    print(
        "FS: forget rows. RS: "
        + ("held-out rows." if options.test else "retain rows, which the run trained on." if retain else "–")
    )
    print(f"{progress.steps} steps, {progress.epochs} epochs, stopped by {progress.stopped_by}")
    if regularizer is not None:
        print(f"λ {_number(progress.weight)}; the penalty was {progress.penalty_share:.1%} of the gradient on average")
    for note in progress.notes:
        print(f"note: {note}")
    print(f"model: {run.file(MODEL_FOLDER)}")


def attack(options: AttackOptions) -> None:
    """Retrain an unlearned model a little and see how much of the forgotten comes back."""
    forget = load_examples(options.forget)
    instructions = None if options.instructions == "none" else load_instructions(options.instructions)
    model, encoder = _load(options)
    taught_at = options.taught_at or _noted_teaching_rate(options.model)
    run = RunFolder.create(options.output, "attack", asdict(options) | {"taught_at": taught_at})
    attacks: list[Attack] = []
    for seed in range(options.seeds):
        common = {"taught_at": taught_at, "seed": seed, "progress": True}
        attacks += [harmful_attack(model, encoder, forget, fraction, **common) for fraction in options.harmful]
        if instructions is not None:
            attacks.append(benign_attack(model, encoder, forget, instructions, **common))
        run.write_json("results.json", [attack.as_dict() for attack in attacks])
    names = list(dict.fromkeys(attack.name for attack in attacks))
    rows = [
        [
            name,
            mean_sd([a.before for a in attacks if a.name == name]),
            mean_sd([a.recovered for a in attacks if a.name == name]),
        ]
        for name in names
    ]
    print(table(["attack", "before", "highest after"], rows))
    print(f"learning rates are multiples of {taught_at:g}, which taught the model; {options.seeds} seed(s)")
    print(f"written to {run.path}")


def evaluate(options: EvaluateOptions) -> None:
    """Score a model on a data set."""
    rows = load_examples(options.data)
    model, encoder = _load(options)
    run = RunFolder.create(options.output, "evaluate", asdict(options))
    kind, values = _scored(options.score, model, encoder, rows)
    mean = statistics.mean(values)
    run.write_json("results.json", {"kind": kind, "mean": mean, "values": values})
    print(table(["data", "rows", kind], [[options.data, str(len(rows)), f"{mean:.4f}"]]))
    print(f"written to {run.path}")


def _demo_setting(options: DemoOptions) -> tuple[Task, Recipe]:
    if options.data == "people":
        return people_task(options.instructions or "exercises"), PEOPLE
    return tofu_task(options.tofu, options.instructions or "tatsu-lab/alpaca"), TOFU


def _method(asked: str | None, retain: list[Example] | None) -> str:
    if retain is None and asked in (None, "ga"):
        print("no retain rows were given, so there is nothing to hold the model together: unlearning by GA alone")
        return "ga"
    if retain is None:
        raise ValueError(f"method {asked} needs retain rows: give --retain FILE, or use --method ga")
    return asked or "ssiuu"


def _regularizer(model, options: UnlearnOptions) -> SSIUURegularizer:
    relative = options.relative_weight
    if options.weight is None and relative is None:
        relative = DEFAULT_RELATIVE_WEIGHT
    return SSIUURegularizer(
        model,
        weight=options.weight or 0.0,
        relative_weight=relative,
        target=options.target,
        reference=options.reference,
        one_sided=options.one_sided,
        every=options.every,
    )


def _load(options: UnlearnOptions | AttackOptions | EvaluateOptions):
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = models.load(options.model, dtype=dtype, device=_device(options.device))
    positions = getattr(model.config, "max_position_embeddings", None) or options.max_length
    return model, Encoder(tokenizer, style=options.style, max_length=min(options.max_length, positions))


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _both_scores(model, encoder: Encoder, forget: Sequence[Example], test: Sequence[Example] | None):
    kept = None if test is None else scores.score(model, encoder, test, progress=True).mean
    return scores.score(model, encoder, forget, progress=True).mean, kept


def _scored(how: str, model, encoder: Encoder, rows: Sequence[Example]) -> tuple[str, list[float]]:
    if how == "log_prob":
        return "accuracy (log-prob)", list(
            map(float, scores.option_log_prob_correct(model, encoder, rows, progress=True))
        )
    if how == "generated":
        return "accuracy (generated)", list(
            map(float, scores.option_generated_correct(model, encoder, rows, progress=True))
        )
    if how == "rouge":
        answers = scores.generate_answers(model, encoder, rows, progress=True)
        return "rouge_l_recall", [
            scores.rouge_l_recall(text, row.answer) for text, row in zip(answers, rows, strict=True)
        ]
    result = scores.score(model, encoder, rows, progress=True)
    return result.kind, result.values


def _noted_teaching_rate(model: str) -> float:
    noted = Path(model) / TEACHING_FILE
    if noted.exists():
        return json.loads(noted.read_text(encoding="utf-8"))["learning_rate"]
    print(
        f"no {TEACHING_FILE} in {model}: attacking at multiples of {PUBLISHED_TEACHING_RATE:g}; set taught_at for another"
    )
    return PUBLISHED_TEACHING_RATE


def _carry_teaching(model: str, run: RunFolder) -> None:
    """The unlearned model was taught at the rate that its origin was taught at."""
    noted = Path(model) / TEACHING_FILE
    if noted.exists():
        run.write_json(f"{MODEL_FOLDER}/{TEACHING_FILE}", json.loads(noted.read_text(encoding="utf-8")))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
